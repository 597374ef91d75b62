"""Supervisor: keeps one Python program running on exactly the code that is on disk, and proves it."""
