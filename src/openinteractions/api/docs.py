"""Pieces of the OpenAPI description that routes with prebuilt answers share."""

from typing import Any

from pydantic import BaseModel


class Fault(BaseModel):
    """What went wrong."""

    code: str
    """A stable word, for programs."""
    message: str
    """For people: what is wrong, where, and how to mend it."""
    status: str
    """The RPC status name."""


class ErrorBody(BaseModel):
    """Every answer with a status of 400 or more."""

    error: Fault


_TEXT = {
    400: "A field is wrong, missing, unknown, or asks for what this server cannot do.",
    401: "No API key, or one that is unknown or revoked.",
    404: "Absent, deleted, expired, or another project's.",
    413: "The body is larger than allowed.",
    429: "A budget of the key or the project is used up.",
    503: "The server cannot serve now; nothing was accepted.",
}

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": text} for status, text in _TEXT.items()
}


def json_response(model: type[BaseModel]) -> dict[str, Any]:
    """A JSON answer of this shape."""
    return {"model": model}


def stream_response() -> dict[str, Any]:
    """An answer that may also be an event stream."""
    text = {"type": "string"}
    event = {
        "type": "object",
        "description": "One event: `data` is a JSON document, in the last one `[DONE]`.",
        "properties": {"event": text, "data": text, "id": text},
        "required": ["event", "data"],
    }
    return {
        "content": {"text/event-stream": {"schema": event}},
        "description": "The interaction, or its events.",
    }


def json_body(name: str) -> dict[str, Any]:
    """A required JSON body, described by a named schema, validated by the route itself."""
    schema = {"$ref": f"#/components/schemas/{name}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>OpenInteractions API</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
h2{border-bottom:1px solid #ddd;margin-top:2.5rem}code,pre{font:14px ui-monospace,monospace}
pre{background:#f6f6f6;padding:.8rem;overflow:auto}.m{font-weight:700;text-transform:uppercase}
table{border-collapse:collapse}td,th{padding:.2rem .8rem .2rem 0;text-align:left;vertical-align:top}
details{margin:.5rem 0}@media(prefers-color-scheme:dark){body{background:#111;color:#ddd}
pre{background:#1d1d1d}}
</style></head><body><h1>OpenInteractions API</h1>
<p>The machine-readable description is at <a href="openapi.json">openapi.json</a>.</p>
<main id="main">Loading…</main>
<script>
const el=(tag,text,...kids)=>{const e=document.createElement(tag);if(text)e.textContent=text;
e.append(...kids);return e};
fetch("openapi.json").then(r=>r.json()).then(api=>{const main=document.getElementById("main");
main.textContent="";const schema=name=>api.components.schemas[name];
for(const[path,methods]of Object.entries(api.paths))for(const[method,op]of Object.entries(methods)){
const h=el("h2");const m=el("span",method);m.className="m";h.append(m," ",el("code",path));
main.append(h,el("p",op.description||op.summary||""));
if(op.parameters){const t=el("table","",el("tr","",el("th","Parameter"),el("th","In"),
el("th","Type")));for(const p of op.parameters)t.append(el("tr","",el("td",p.name),el("td",p.in),
el("td",p.schema.type||(p.schema.anyOf||[]).map(x=>x.type).join(" | "))));main.append(t)}
const show=(title,content)=>{const d=el("details","",el("summary",title),
el("pre",JSON.stringify(content,null,2)));main.append(d)};
if(op.requestBody)show("Request body",op.requestBody.content);
for(const[status,r]of Object.entries(op.responses))
show(status+" "+(r.description||""),r.content||{})}
main.append(el("h2","Schemas"));for(const name of Object.keys(api.components.schemas)){
main.append(el("details","",el("summary",name),
el("pre",JSON.stringify(schema(name),null,2))))}
}).catch(e=>{document.getElementById("main").textContent="Cannot load openapi.json: "+e});
</script></body></html>
"""


def page() -> bytes:
    """The reference page: one file that loads nothing from anywhere else."""
    return _PAGE.encode()
