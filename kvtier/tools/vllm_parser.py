"""Runs vLLM's own tool parsers on text, for the tool detector."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger(__name__)


def make_parser(name: str, tokenizer: Any) -> Callable[[str], list[str]] | None:
    """Return a function from text to the names of the tools that it calls.

    Args:
        name: A value of vLLM's ``--tool-call-parser``.
        tokenizer: The model's tokenizer, as vLLM's ``get_tokenizer`` returns it.

    Returns:
        The function, or None (with a logged reason) if this vLLM has no such parser, if it does
        not fit the tokenizer, or if it is one that cannot read text. The function raises what
        the parser raises.
    """
    try:
        from vllm.entrypoints.openai.chat_completion.protocol import (  # noqa: PLC0415 - lazy
            ChatCompletionRequest,
        )
        from vllm.tool_parsers import ToolParserManager  # noqa: PLC0415 - lazy
    except ImportError as error:
        logger.warning("kvtier: tool parsers of this vLLM cannot be imported: %s", error)
        return None

    request = ChatCompletionRequest.model_validate(
        {"model": "kvtier", "messages": [{"role": "user", "content": ""}]}
    )

    def parse(text: str) -> list[str]:
        result = parser.extract_tool_calls(text, request=request)
        if not result.tools_called:
            return []
        return [call.function.name for call in result.tool_calls if call.function.name]

    try:
        parser = ToolParserManager.get_tool_parser(name)(tokenizer)
        parse("")
    except Exception as error:  # noqa: BLE001 - constructors refuse a tokenizer in many ways
        logger.warning("kvtier: tool parser %r is not usable here: %r", name, error)
        return None
    return parse
