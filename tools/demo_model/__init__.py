"""How the demo model is made: text, tokenizer, network, training, export, measurement.

Run the parts as modules from the repository root, e.g. ``python -m tools.demo_model.train --help``.
README.md beside this file gives the order and the commands.  Nothing here is imported by `flashmoe`.
"""
