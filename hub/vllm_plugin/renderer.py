"""Chat messages become prompts, with control tokens in their texts escaped: no text writes a turn or a placeholder."""

from vllm.renderers.hf import HfRenderer

from .processing import load_processor


class GranulonRenderer(HfRenderer):
    def render_messages(self, messages, params):
        return super().render_messages(self._escaped(messages), params)

    async def render_messages_async(self, messages, params):
        return await super().render_messages_async(self._escaped(messages), params)

    def _escaped(self, messages):
        return load_processor(self.model_config).escape_control_tokens(messages)
