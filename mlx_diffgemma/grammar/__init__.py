"""Constraints on text: from a regular expression or a JSON schema to what a canvas may say.

language    languages as sequences, choices and repeats of characters
budget      how long a compilation may take
characters  sets of characters of ECMA-262 and Unicode
regex       from a regular expression of ECMA-262 to a language
decimals    languages of numbers within bounds
schema      from a JSON schema to a language, or a refusal that names the keyword
checker     whether values fit a schema, in bounded time
automaton   from a language to a minimal automaton over bytes
tokens      from that automaton to one over the tokens of a vocabulary, and their classes
compilation from a constraint to the automaton over tokens, in another process if wanted
elsewhere   the thread or process in which long work runs
program     the dynamic programme over positions, states and classes: marginals, best path, draw
constraint  all of it for one model: compiled once, then from a step's logits to classes and from
            classes to tokens
"""
