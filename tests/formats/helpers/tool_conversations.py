"""Conversations with tools, as transformers' `apply_chat_template` takes them, with ids that every template takes."""

import json

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a town.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "its name"},
                "unit": {"type": "string", "enum": ["°C", "°F"]},
                "days": {"type": "array", "items": {"type": "integer"}},
            },
            "required": ["city"],
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock", "description": "The time.",
                                          "parameters": {"type": "object", "properties": {}}}}  # fmt: skip


def call(call_id, name, **arguments):
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def result(call_id, name, content):
    return {"role": "tool", "tool_call_id": call_id, "name": name, "content": content}


USER = {"role": "user", "content": "Wie ist das Wetter in Ålesund? 🙂"}
BYE = {"role": "assistant", "content": "Regen."}
OSLO = call("callabc01", "get_weather", city='Ålesund "x"', unit="°C", days=[1, 2])
TOOL_CONVERSATIONS = [
    [USER],
    [{"role": "system", "content": "Be kind."}, USER],
    [USER, {"role": "assistant", "content": None, "tool_calls": [OSLO]}, result("callabc01", "get_weather", '{"t": -3}')],
    [USER, {"role": "assistant", "content": "", "tool_calls": [OSLO]}, result("callabc01", "get_weather", "-3"), BYE, USER],
    [USER, {"role": "assistant", "content": "I look.", "tool_calls": [OSLO]}, result("callabc01", "get_weather", "-3")],
    [USER, {"role": "assistant", "content": "", "tool_calls": [OSLO, call("callabc02", "clock")]},
     result("callabc01", "get_weather", "-3"), result("callabc02", "clock", "noon")],
    [USER, {"role": "assistant", "content": "", "tool_calls": [call("callabc02", "clock")], "reasoning_content": "Hm, what?",
            "thinking": "Hm, what?"}, result("callabc02", "clock", "noon")],
    [{"role": "developer", "content": "Be brief."}, USER,
     {"role": "assistant", "content": "Ja", "reasoning_content": "Hm"}, USER],
]  # fmt: skip


def as_openai(messages):
    """The same conversation as OpenAI's API has it: arguments as text, and no fields of templates."""
    turns = json.loads(json.dumps([{k: v for k, v in turn.items() if k != "thinking"} for turn in messages]))
    for turn in turns:
        for one in turn.get("tool_calls", ()):
            one["function"]["arguments"] = json.dumps(one["function"]["arguments"])
    return turns


def as_taken(messages, forms):
    """What ours is to equal: the conversation for transformers, mended where the template would lose or spell something
    wrongly. None if it takes one call at a time, and there are two."""
    if any(len(turn.get("tool_calls", ())) > 1 for turn in messages) and not forms.turns.calls.parallel:
        return None
    turns = json.loads(json.dumps(messages))
    for turn in turns:
        if turn["role"] == "developer" and not forms.turns.developer:
            turn["role"] = "system"
        if turn["content"] is None and not forms.turns.calls.absent:
            turn["content"] = ""  # else "None" is written, or the template fails
    return turns
