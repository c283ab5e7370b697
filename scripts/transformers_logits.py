#!/usr/bin/env python3
"""Loads a checkpoint folder with transformers and prints what it makes of a text: tokens, and the logits behind each.

    scripts/transformers_logits.py FOLDER < TEXT    prints {"tokens": [...], "logits": [[...], ...]}

Needs transformers and torch. A test of the stage `train` runs it where `GRLM_PYTHON` names a Python that has them.
"""
import json
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, text = sys.argv[1], sys.stdin.read()
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
with torch.no_grad():
    logits = model(input_ids=torch.tensor([tokens])).logits[0]
print(json.dumps({"tokens": tokens, "logits": logits.tolist()}))
