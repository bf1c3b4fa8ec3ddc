"""The tests, a package by name so that no other distribution's `tests` can stand in front of it."""
