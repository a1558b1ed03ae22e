"""The smoke test: a real server is started on an artifact, asked, compared with what was evaluated, timed, ended.

`served_check.py`, and what it imports, load without torch.
"""
