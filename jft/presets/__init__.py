"""Published methods, one to a file: the preset, whatever only it needs, and where it departs from its paper.

Every module here is imported when a preset is first asked for (:mod:`jft.methods.registry`); nothing else imports this folder.
"""
