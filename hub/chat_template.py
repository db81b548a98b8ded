"""A language model's own chat template, taught that a message may hold images."""

# Runs before the template and hands it what it knows: messages whose content is a string. Lists of anything but text
# and image parts stay as they are, a tool may return them. Text parts are lines, so that no two of them join into a
# control token that neither holds. The closing line break leaves Jinja in the state in which a template begins.
FLATTEN = """\
{%- set flattened = namespace(messages=[]) -%}
{%- for message in messages -%}
    {%- set parts = message['content'] if 'content' in message else none -%}
    {%- if parts is sequence and parts is not string and parts is not mapping and parts
           and parts | selectattr('type', 'in', ['image', 'text']) | list | length == parts | length -%}
        {%- set text -%}
            {%- for part in parts -%}
                {%- if part['type'] == 'image' -%}
                    {{ IMAGE_TOKEN }}
                {%- else -%}
                    {%- if loop.previtem is defined and loop.previtem['type'] == 'text' -%} {{ '\\n' }} {%- endif -%}
                    {{ part['text'] }}
                {%- endif -%}
            {%- endfor -%}
        {%- endset -%}
        {%- set message = dict(message, content=text) -%}
    {%- endif -%}
    {%- set flattened.messages = flattened.messages + [message] -%}
{%- endfor -%}
{%- set messages = flattened.messages %}
"""


def with_image_parts(template, image_token):
    """
    A chat template that renders `[{"type": "image"}, {"type": "text", "text": ...}]` contents, and plain strings
    exactly as before.

    Args:
        template (`str` or `dict[str, str]`): a text model's chat template, or several by name.
        image_token (`str`): what stands for an image.

    Returns:
        the same type as `template`.
    """
    if isinstance(template, dict):
        return {name: with_image_parts(entry, image_token) for name, entry in template.items()}
    return FLATTEN.replace("IMAGE_TOKEN", repr(image_token)) + template
