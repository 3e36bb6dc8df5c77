"""What the tests of the public API share: one stack a module, with aliases and settings of single models."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import anthropic
import openai
import pytest_asyncio

from rbee.testing import LocalStack
from rbee.testing.stack import ONE_THREAD

API_CONFIG = f"""{ONE_THREAD}
[aliases]
"my/fast:one" = "smollm2:135m"

[models."smollm2:135m"]
defaults = {{ min_p = 0.05 }}
stripped = ["logit_bias"]
"""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def api_stack(rbee_models: Path) -> AsyncIterator[LocalStack]:
    """Give a queen and a hive that all tests of a module ask; they must leave nothing running."""
    async with LocalStack(models=rbee_models, config=API_CONFIG) as stack:
        yield stack


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def openai_client(api_stack: LocalStack) -> AsyncIterator[openai.AsyncOpenAI]:
    """Give OpenAI's own client of the stack; it tries nothing twice."""
    async with openai.AsyncOpenAI(base_url=f"{api_stack.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def anthropic_client(api_stack: LocalStack) -> AsyncIterator[anthropic.AsyncAnthropic]:
    """Give Anthropic's own client of the stack; it tries nothing twice."""
    async with anthropic.AsyncAnthropic(base_url=api_stack.url, api_key="none", max_retries=0) as client:
        yield client
