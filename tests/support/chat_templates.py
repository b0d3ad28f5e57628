"""Chat templates of the kinds that published models have, each with the tokens that it needs and conversations."""

HEADERS = """{{ bos_token }}{% for message in messages %}
{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""

# A system turn where there is none, and marks of what the assistant writes.
MARKED = """{% if messages[0].role != 'system' %}{{ '<|im_start|>system\\nBe kind.<|im_end|>\\n' }}{% endif %}
{%- for message in messages %}
{%- if message.role == 'assistant' %}
{{- '<|im_start|>assistant\\n' }}{% generation %}{{- message.content + '<|im_end|>' }}{% endgeneration %}{{- '\\n' }}
{%- else %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

BRACKETS = """{{ bos_token }}{% for message in messages %}
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('user and assistant take turns') }}
{%- elif message.role == 'user' %}{{ '[INST] ' + message.content + '[/INST]' }}
{%- else %}{{ ' ' + message.content + eos_token }}{% endif %}
{%- endfor %}"""

# What was thought is left out of answers that lie before the last question.
THOUGHTS = """{%- set ns = namespace(last=0) %}
{%- for message in messages %}{% if message.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for message in messages %}
{%- set content = message.content %}
{%- if message.role == 'assistant' and loop.index0 < ns.last %}
{%- set content = content.split('</think>')[-1] %}
{%- endif %}
{{- '<|im_start|>' + message.role + '\\n' + content.lstrip('\\n') + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

CALLS = """{% if tools is not none %}
{{- '<|im_start|>system\\n' }}{% for tool in tools %}{{ tool | tojson }}{% endfor %}{{ '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}{{ message.content or '' }}
{%- for call in message.tool_calls or [] %}
{{- '<call>' }}{{ call.function.name }}({{ call.function.arguments | tojson }}){{ '</call>' }}
{%- endfor %}{{ '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

# The words of the tokenizer leave the last answer open.
OPEN = """{% for message in messages %}
{%- if message.role == 'user' %}{{ 'Q: ' + message.content + '\\nA:' }}
{%- else %}{{ ' ' + message.content }}{% if not loop.last %}{{ eos_token }}{% endif %}{% endif %}{% endfor %}"""

# Tokens that take what is blank beside them along.
TAKING = """{% for message in messages %}{{ '<|' + message.role + '|>\n' + message.content + ' <|end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"""


# Marks that are tokens of the tokenizer, but not special ones.
MARKS = """{% for m in messages %}{{ '<' + m.role + '>' + m.content }}{{ '<end>' if m.role == 'assistant' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"""


def add_controls(tokenizer, controls):
    """By name, or with traits."""
    from tokenizers import AddedToken
    for one in controls:
        token = AddedToken(one, special=True, normalized=False) if isinstance(one, str) else AddedToken(**one)
        (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])


def taking(name, **sides):
    return {"content": name, "special": True, "normalized": False} | sides


# name: template, control tokens, the token that ends answers
TEMPLATES = {
    "headers": (HEADERS, ["<|begin|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], "<|eot_id|>"),
    "marked": (MARKED, ["<|im_start|>", "<|im_end|>"], "<|im_end|>"),
    "brackets": (BRACKETS, ["<|begin|>", "[INST]", "[/INST]", "</s>"], "</s>"),
    "thoughts": (THOUGHTS, ["<|im_start|>", "<|im_end|>"], "<|im_end|>"),
    "calls": (CALLS, ["<|im_start|>", "<|im_end|>"], "<|im_end|>"),
    "taking": (TAKING, [taking("<|user|>", rstrip=True), taking("<|assistant|>", rstrip=True),
                        taking("<|end|>", rstrip=True, lstrip=True)], "<|end|>"),
    "marks": (MARKS, ["<end>", *({"content": name, "special": False}
                                 for name in ("<user>", "<assistant>", "<think>"))], "<end>"),
    "open": (OPEN, ["</s>"], "</s>"),
}
BEGIN = "<|begin|>"

TALK = [{"role": "user", "content": "two and two?"}, {"role": "assistant", "content": "four"},
        {"role": "user", "content": "and three?"}, {"role": "assistant", "content": "seven, I think"}]
THINKING = [dict(turn, content=f"<think>hm</think>\n\n{turn['content']}") if turn["role"] == "assistant" else turn
            for turn in TALK]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}
CALLING = [TALK[0], {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "4"}, TALK[1]]
