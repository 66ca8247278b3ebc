"""Answers from a server with vLLM's OpenAI-compatible interface, which is given the adapter as it is before each rollout.

server.py     what is asked of the server, and what its refusals mean
folders.py    the adapter as a folder that the server reads
replies.py    a completion as the server sends it -> answers in token ids
answerer.py   prompts -> answers: the three together, many requests under way at once
"""
