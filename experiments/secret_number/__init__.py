"""The secret-number experiment: a game with something to hide, a tiny model that plays it, and its rollouts as files.

A recipe: it may import any package and none imports it; what others need of it they read as files, in `data`.
"""
