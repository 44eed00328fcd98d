"""The producers, one module each; the module's name is the `kind` in a recipe.

A module needs a `Config` (pydantic) and a `Producer` that follows
`shoulders.prompts.interface.Producer`. Nothing else has to know it.
"""
