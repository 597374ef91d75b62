"""What runs inside the supervised process before, and beside, the application.

The rule: small, standard library only, and invisible to the application. These modules import nothing of the
supervisor; in a child they are loaded under a private package name, so that a tree may have modules called
``supervisor``, ``monitor`` or ``child`` of its own.
"""
