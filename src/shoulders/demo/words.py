"""Everyday English words for the demo: nouns by kind, and verbs in their base form.

Plain constants. Every noun is countable and stands under exactly one kind. About one in four
begins with a vowel, so that "a" and "an" can both be practised. The verbs leave out those with a
final unstressed syllable such as "visit", whose -ing form the package `inflect` misspells.
"""

from __future__ import annotations

NOUNS: dict[str, str] = {
    "animal": """
        alligator ant antelope ape armadillo bat bear beaver bee bird butterfly camel cat cow crab
        crocodile deer dog dolphin donkey duck eagle eel elephant emu fox frog giraffe goat goose
        hippo horse iguana insect kangaroo lion lizard monkey moth mouse octopus ostrich otter owl
        ox panda parrot penguin pig pigeon rabbit rat shark sheep snake spider squirrel tiger turtle
        whale wolf zebra
    """,
    "food": """
        acorn almond apple apricot artichoke avocado banana bean biscuit bun burger cake carrot
        cherry coconut cookie cucumber doughnut egg eggplant grape lemon loaf mango melon muffin
        mushroom noodle olive omelette onion orange pancake pea peach pear pie pizza plum potato
        pumpkin radish salad sandwich sausage strawberry tomato waffle walnut
    """,
    "clothing": """
        anorak apron belt blouse bonnet boot cap cardigan cloak coat dress earring glove gown hat
        helmet hood jacket kilt mitten necktie overcoat pullover raincoat robe sandal scarf shirt
        shoe skirt slipper sneaker sock stocking suit sweater tunic undershirt uniform vest
    """,
    "body": """
        abdomen ankle arm armpit artery beard bone brain cheek chin ear elbow eye eyebrow eyelash
        eyelid finger foot forehead hand heart heel hip jaw kidney knee leg lip liver lung mouth
        muscle neck nose rib shoulder skull stomach thigh throat thumb toe tongue tooth wrist
    """,
    "tool": """
        anvil awl axe broom brush bucket chisel crowbar drill eraser hammer hoe hook knife ladder
        lever mop nail needle oilcan pencil rake razor rope ruler saw screw screwdriver shovel
        sickle spade spanner spoon trowel wrench
    """,
    "vehicle": """
        airplane airship ambulance automobile bicycle bike boat bus canoe car cart ferry helicopter
        icebreaker jeep jet kayak limousine lorry minibus moped motorcycle raft rocket sailboat
        scooter ship sled submarine taxi tractor train tram tricycle truck van wagon yacht
    """,
    "building": """
        abbey airport apartment aquarium arena bakery bank barn bungalow cabin castle cathedral
        chapel church cinema clinic cottage embassy factory garage hospital hotel house hut igloo
        inn library mansion mill monastery mosque museum observatory office orphanage palace prison
        restaurant school shed stadium temple theater tower university villa warehouse
    """,
    "instrument": """
        accordion bassoon bell bugle cello clarinet cymbal drum fiddle flute gong guitar
        harmonica harp lute mandolin oboe organ piano saxophone tambourine trombone trumpet tuba
        ukulele viola violin xylophone zither
    """,
}

VERBS: str = """
    add aim argue arrange arrive ask bake bark bathe beat beg believe bend bite blame bleed blow
    boil borrow bounce break breathe bring build burn buy call care carry carve cast catch cause
    change charge chase cheat choose chop clap clean climb close come cook copy cough count crash
    crawl create cry cut dance dare decide deny describe die dig dive draw dream drink drive drop
    dry earn eat escape explain fail fall feed feel fight fill find fix float fly fold follow
    forget freeze fry get give glow go grab grin grow guess hang hear help hide hit hold hop hope
    hug hunt hurry imagine invite jog join joke juggle jump keep kick kiss kneel knit knock know
    laugh lead lean leap learn leave lend lie lift like live look lose love make manage march
    marry measure meet melt mix move nap nod notice obey pack paint pass pay plan plant play pour
    practise pray press promise pull push put raise reach read refuse relax repeat rest ride ring
    rise roll row rub run sail save say scream scrub search see sell send serve sew shake share
    shave shine shop shout show shut sing sink sit skate ski skip sleep slide slip smell smile
    sneeze snow solve speak spell spend spin split stand stare start stay steal step stir stop
    study swim swing take talk taste teach tear tell thank think throw tie touch trade trap trip
    trust try turn type use wait wake walk warn wash waste watch wave wear weep win wipe wish work
    worry wrap write yawn
"""
