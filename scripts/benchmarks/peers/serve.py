"""Answers requests with the methods of an object, in whichever Python a peer runs."""

import json
import sys
from typing import Any

import torch


def serve(peer: Any) -> None:
    """Read requests as JSON, a line each, from standard input and write an answer to each."""
    answers, sys.stdout = sys.stdout, sys.stderr  # packages print
    torch.set_num_threads(1)
    for line in sys.stdin:
        request = json.loads(line)
        answer = getattr(peer, request.pop("do"))(**request)
        print(json.dumps(answer), file=answers, flush=True)
