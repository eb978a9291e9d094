"""graphprune inside other tools' export pipelines; each module needs the tool it is named after.

Nothing here is imported before it is asked for.
"""
