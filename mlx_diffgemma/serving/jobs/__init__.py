"""The jobs that the server gives to its scheduler, one kind per module.

A job is made on a preparation thread, where everything that can be refused is refused.  It runs on
the engine's thread and reports by events.
"""
