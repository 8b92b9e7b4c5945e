"""Laws of physics that a model declares it cannot keep: it must then really break them."""

from collections.abc import Mapping

import pytest


def expect_failure(request: pytest.FixtureRequest, exempt_laws: Mapping[str, str]) -> None:
    """Expect the requesting test to fail if it is the law of an exemption; one that holds fails."""
    law = getattr(request.node, "originalname", request.node.name).removeprefix("test_")
    if law in exempt_laws:
        reason = exempt_laws[law]
        request.applymarker(pytest.mark.xfail(strict=True, raises=AssertionError, reason=reason))
