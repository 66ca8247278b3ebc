"""Ollama's part of an export: a Modelfile whose template says what the model's own chat template says.

    own.py          the model's own prompts, as text: what everything here is held against
    probes.py       conversations that are asked of both
    pieces.py       the texts around turns, found by rendering sentinels; gaps.py: how a rendering is cut at them
    calls.py        the same for tool calls and tool results; reasoning.py: for reasoning
    compose.py      those texts as a template; go_nodes.py: a template as nodes, and nodes as text
    derive.py       pieces, composed: the template and what has to be said about it
    values.py       a conversation as Ollama hands it to a template
    go_template.py  Go's text/template, as far as templates made here use it; go_parse.py: its grammar
    compare.py      what both say to the same conversations, and where they part
    modelfile.py    the Modelfile's text; make.py: the file of an export

What Ollama does with a template was read in its sources (template/template.go, thinking/template.go, tools/template.go and
parser/parser.go of 0.14 and later) and is said where it matters.
"""
