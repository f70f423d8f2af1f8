"""Compares pairs from standard input with every way from text to running Python wired to a trap."""

import builtins
import json
import re
import sys

import latex2sympy2_extended.latex2sympy2 as latex2sympy
import math_verify.parser as parser
import sympy.parsing.sympy_parser as sympy_parser

from sparring.rewards import math_worker

sprung = []
plain_sympify = sys.modules["sympy.core.sympify"].sympify


def trap(name):
    def sprung_trap(*arguments, **_):
        sprung.append([name, repr(arguments)[:200]])
        raise RuntimeError("a trap was sprung")

    return sprung_trap


def sympify(value, *arguments, **named):
    if isinstance(value, str) and not re.fullmatch(r"\s*[\d.]+\s*|[A-Za-z]+", value, re.ASCII):
        sprung.append(["sympify", value[:200]])
    return plain_sympify(value, *arguments, **named)


def main():
    math_worker._say = lambda message: None
    comparer = math_worker.Comparer()
    parser.parse_expr = latex2sympy.parse_expr = trap("parse_expr")
    sympy_parser.parse_expr = trap("parse_expr")
    sympy_parser.eval_expr = trap("eval_expr")
    for module in list(sys.modules.values()):
        if getattr(module, "sympify", None) is plain_sympify:
            module.sympify = sympify
    builtins.eval = trap("eval")
    pairs = json.loads(sys.stdin.read())
    for reference, answer in pairs:
        comparer.compare(reference, answer)
    seen = list(sprung)
    parser.parse("2*3")  # the default configuration, which does spring it
    works = len(sprung) > len(seen)
    print(json.dumps({"compared": len(pairs), "sprung": seen, "trap_works": works}))


if __name__ == "__main__":
    main()
