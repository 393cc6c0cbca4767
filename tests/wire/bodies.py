"""Valid requests of every kind."""

PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNk+A8AAQUBAScY42YAAAAASUVORK5CYII="

SDK_BODIES = [
    {"model": "gemini-3.6-flash", "input": "Say hi"},
    {"model": "m", "input": {"type": "text", "text": "Hi"}},
    {
        "model": "m",
        "input": [
            {"type": "text", "text": "What is this?"},
            {"type": "image", "mime_type": "image/png", "data": PNG, "resolution": "low"},
            {"type": "document", "uri": "https://ex.org/a.pdf", "processing": "static"},
            {
                "type": "video",
                "uri": "files/v",
                "processing": {"type": "static", "fps": 1, "start_offset": "1.5s"},
            },
            {"type": "audio", "uri": "files/a", "processing": {"type": "static"}},
        ],
    },
    {
        "model": "m",
        "store": False,
        "input": [
            {"type": "user_input", "content": [{"type": "text", "text": "Weather?"}]},
            {"type": "thought", "signature": "QUJD", "summary": [{"type": "text", "text": "s"}]},
            {"type": "function_call", "id": "a", "name": "w", "arguments": {}, "signature": "Q"},
            {"type": "function_result", "call_id": "a", "name": "w", "result": {"temp": 22}},
            {"type": "code_execution_call", "id": "c", "arguments": {"code": "1"}},
            {"type": "code_execution_result", "call_id": "c", "result": "1\n", "is_error": False},
            {
                "type": "model_output",
                "content": [
                    {
                        "type": "text",
                        "text": "Rome",
                        "annotations": [{"type": "url_citation", "url": "u", "start_index": 0}],
                    }
                ],
            },
            {"type": "user_input", "content": [{"type": "text", "text": "And Oslo?"}]},
        ],
    },
    {
        "model": "m",
        "previous_interaction_id": "v1_B",
        "tools": [
            {
                "type": "function",
                "name": "get_weather",
                "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
            },
            {"type": "google_search", "search_types": ["web_search"]},
            {
                "type": "mcp_server",
                "name": "docs",
                "url": "https://ex.org/mcp",
                "headers": {"Authorization": "Bearer secret"},
                "allowed_tools": [{"mode": "any", "tools": ["b"]}],
            },
        ],
        "input": [
            {"type": "function_result", "call_id": "un6k8t18", "result": {"temp_c": 22}},
            {"type": "function_result", "call_id": "p02kd7aa", "name": "w", "result": "3C"},
        ],
    },
    {
        "model": "m",
        "input": "x",
        "stream": True,
        "background": True,
        "system_instruction": "Be brief",
        "generation_config": {
            "temperature": 0.5,
            "seed": 7,
            "thinking_level": "low",
            "tool_choice": {"allowed_tools": {"mode": "any", "tools": ["google_search"]}},
            "speech_config": [{"voice": "Kore"}],
        },
        "tools": [{"type": "google_search"}],
        "response_format": {
            "type": "text",
            "mime_type": "application/json",
            "schema": {"type": "object"},
        },
        "safety_settings": [{"type": "harassment", "threshold": "off"}],
        "service_tier": "flex",
        "labels": {"team": "a-1"},
        "webhook_config": {"uris": ["https://ex.org/h"], "user_metadata": {"a": None}},
        "limits": {"max_total_tokens": "5000", "max_cost_usd": 1},
    },
    {
        "agent": "antigravity-preview-09-2026",
        "input": "Compute 6*7 and save it",
        "environment": {
            "type": "remote",
            "sources": [{"type": "INLINE", "content": "x", "target": "/workspace/a"}],
            "network": {
                "allowlist": [
                    {"domain": "a.org", "transform": {"X-Key": "secret"}, "credential": "gh"}
                ]
            },
            "env": {"A": "secret", "B": {"value": "secret"}, "C": {"credential": "gh"}},
        },
        "agent_config": {"type": "antigravity", "max_total_tokens": "5000"},
    },
    {
        "agent": "a",
        "input": "x",
        "environment": "remote",
        "agent_config": {"type": "dynamic", "k": [1]},
    },
    {"model": "m", "continuation_token": "t", "previous_interaction_id": "v1_a"},
]
"""As the official SDK sends them (but for `limits`, which is our own)."""

CURL_BODIES = [
    {"model": "m", "input": [{"role": "user", "content": "a"}, {"role": "model", "content": "b"}]},
    {"model": "m", "input": [{"type": "user_input", "content": "And Oslo?"}]},
    {
        "model": "m",
        "input": "x",
        "tools": [
            {
                "type": "mcp_server",
                "name": "a",
                "url": "https://a.org",
                "allowed_tools": ["a"],
                "credential": "secret",
            }
        ],
        "environment": {"type": "remote", "env": [{"A": "secret"}], "network": "disabled"},
        "response_format": [{"type": "object"}, {"type": "image", "image_size": "2K"}],
    },
]
BODIES = [*SDK_BODIES, *CURL_BODIES]
