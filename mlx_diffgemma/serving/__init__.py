"""The HTTP server: a thread that runs many answers at once, and the protocols in front of it.

A request goes through ``handlers`` (routes), ``intake`` (read and prepare), ``protocols`` (its body
becomes a task), ``jobs`` (the task becomes a job) and ``engine`` (the thread of the scheduler).
Events of the job come back through a ``mailbox``.  ``formats`` defines what a protocol does with
them.
"""
