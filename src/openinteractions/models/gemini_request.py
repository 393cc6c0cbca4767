"""A `ModelCall` as the options of a Gemini request, and what of it cannot be honoured."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from openinteractions.errors import Invalid
from openinteractions.models.gemini_models import is_old
from openinteractions.models.port import (
    THOUGHTS_AS_GIVEN,
    Json,
    ModelCall,
    Warning,  # noqa: A004 - the port's word
)

_PLAIN: Final = {
    "max_output_tokens": "maxOutputTokens",
    "seed": "seed",
    "stop_sequences": "stopSequences",
    "temperature": "temperature",
    "top_p": "topP",
    "top_k": "topK",
}
# Gemini 2.5 knows no levels. These are the budgets of Google's own OpenAI-compatible endpoint:
# https://ai.google.dev/gemini-api/docs/openai#thinking
_BUDGETS: Final = {"minimal": 1024, "low": 1024, "medium": 8192, "high": 24_576}
# Models that think unless told otherwise; the others answer `includeThoughts` with a 400:
# https://github.com/google-gemini/gemini-cli/pull/3033
_THINKS: Final = re.compile(
    r"gemini-(?:2\.5-(?:pro|flash)|[3-9]|(?:pro|flash)-latest)(?!.*(?:lite|image|tts|audio|live))"
)
_SERVER_TOOLS: Final = frozenset(
    {"code_execution", "url_context", "google_search", "google_maps", "file_search"}
)
_MODALITIES: Final = frozenset({"text", "image", "audio", "video"})
_TIERS: Final = frozenset({"flex", "standard", "priority"})
_L16: Final = "audio/l16"
_PCM_RATE: Final = 24_000


def options(call: ModelCall) -> tuple[Json, list[Warning]]:
    """Everything of a request's body but its `contents`, and what was downgraded on the way.

    Raises:
        Invalid: Something that Gemini cannot do at all.
    """
    request = _Request(call)
    return request.body, request.warnings


class _Request:
    def __init__(self, call: ModelCall) -> None:
        self.body: Json = {}
        self.warnings: list[Warning] = []
        self._tool_config: Json = {}
        if call.system:
            self.body["systemInstruction"] = {"parts": [{"text": call.system}]}
        self._tools(call)
        config = self._generation(call)
        if config:
            self.body["generationConfig"] = config
        if call.safety_settings:
            self.body["safetySettings"] = self._safety(call.safety_settings)
        if call.service_tier in _TIERS:
            self.body["serviceTier"] = call.service_tier
        elif call.service_tier is not None:
            self._warn("service_tier", f"The tier '{call.service_tier}' is not known to Gemini.")

    def _warn(self, field: str, message: str) -> None:
        self.warnings.append(Warning("downgraded", field, message))

    # Tools ------------------------------------------------------------------------------------

    def _tools(self, call: ModelCall) -> None:
        functions: list[Json] = []
        native: list[Json] = []
        for index, tool in enumerate(call.tools):
            if tool["type"] == "function":
                functions.append(_declaration(tool))
            else:
                native.append(self._native(tool, index))
        if functions and is_old(call.model):
            # Such a model would refuse the whole request; it comes here as a fallback of others.
            for index, tool in enumerate(call.tools):
                if tool["type"] in _SERVER_TOOLS:
                    self._warn(f"tools[{index}]", "This model takes it only without functions.")
            native = [one for one in native if "computerUse" in one]
        self._choose(call.tool_choice, functions)
        tools = [*([{"functionDeclarations": functions}] if functions else []), *native]
        if functions and native and not is_old(call.model):
            # Gemini 3 takes built-in tools beside functions only with this switch:
            # https://ai.google.dev/gemini-api/docs/tool-combination
            self._tool_config["includeServerSideToolInvocations"] = True
        if tools:
            self.body["tools"] = tools
        if self._tool_config:
            self.body["toolConfig"] = self._tool_config

    def _native(self, tool: Json, index: int) -> Json:
        match tool["type"]:
            case "code_execution":
                wire: Json = {"codeExecution": {}}
            case "url_context":
                wire = {"urlContext": {}}
            case "google_search":
                wire = {"googleSearch": _search(tool, index)}
            case "google_maps":
                wire = {"googleMaps": self._maps(tool)}
            case "file_search":
                wire = {"fileSearch": _file_search(tool)}
            case "computer_use":
                wire = {"computerUse": _computer(tool)}
            case kind:
                raise Invalid(
                    f"The value '{kind}' is not supported for 'tools[{index}].type' with this "
                    "model."
                )
        return wire

    def _maps(self, tool: Json) -> Json:
        if "latitude" in tool and "longitude" in tool:
            place = {"latitude": tool["latitude"], "longitude": tool["longitude"]}
            self._tool_config["retrievalConfig"] = {"latLng": place}
        return {"enableWidget": tool["enable_widget"]} if "enable_widget" in tool else {}

    def _choose(self, choice: str | Json | None, functions: list[Json]) -> None:
        if choice is None:
            return
        if not functions:
            if choice != "auto":
                self._warn("generation_config.tool_choice", "It needs a function to choose.")
            return
        if isinstance(choice, str):
            self._tool_config["functionCallingConfig"] = {"mode": choice.upper()}
            return
        allowed = choice["allowed_tools"]
        mode: str = allowed.get("mode") or "auto"
        names: Sequence[str] = allowed.get("tools") or ()
        config: Json = {"mode": mode.upper()}
        if mode in ("any", "validated"):
            config["allowedFunctionNames"] = list(names)
        elif mode == "auto":
            # The wire takes names only with the other modes.
            functions[:] = [one for one in functions if one["name"] in names]
        self._tool_config["functionCallingConfig"] = config

    # Generation -------------------------------------------------------------------------------

    def _generation(self, call: ModelCall) -> Json:
        given = {name: value for name, value in call.generation.items() if value is not None}
        config: Json = {_PLAIN[name]: given[name] for name in _PLAIN if name in given}
        thinking = self._thinking(given, call.model)
        if thinking:
            config["thinkingConfig"] = thinking
        if "speech_config" in given:
            config["speechConfig"] = _speech(given["speech_config"])
        if "transcription_config" in given:
            config["audioTranscriptionConfig"] = self._transcription(given["transcription_config"])
        known = {*_PLAIN, "thinking_level", "thinking_summaries", "speech_config"}
        for name in given.keys() - known - {"transcription_config", "image_config"}:
            self._warn(f"generation_config.{name}", f"Gemini has no '{name}'; it was left out.")
        if call.json_schema is not None:
            config["responseMimeType"] = "application/json"
            if call.json_schema:
                config["responseJsonSchema"] = call.json_schema
        image, modalities = self._formats(call)
        image = {**_image(given.get("image_config") or {}), **image}
        if image:
            config["imageConfig"] = image
        if modalities:
            config["responseModalities"] = modalities
        return config

    def _thinking(self, given: Mapping[str, Any], model: str) -> Json:
        thinking: Json = {}
        level: str | None = given.get("thinking_level")
        if level == "xhigh":
            level = "high"
            self._warn("generation_config.thinking_level", "'xhigh' was lowered to 'high'.")
        if level is not None and "gemini-2" in model:
            thinking["thinkingBudget"] = _BUDGETS[level]
        elif level is not None:
            thinking["thinkingLevel"] = level.upper()
        summaries = given.get("thinking_summaries")
        if summaries == "auto" or (summaries == THOUGHTS_AS_GIVEN and _THINKS.search(model)):
            thinking["includeThoughts"] = True
        return thinking

    def _transcription(self, asked: Json) -> Json:
        config: Json = {}
        for name, value in asked.items():
            match name:
                case "mode" if isinstance(value, str):
                    config["mode"] = value.upper()
                case "language_codes":
                    config["languageCodes"] = value
                case "custom_vocabulary":
                    config["customVocabulary"] = value
                case _:
                    field = f"generation_config.transcription_config.{name}"
                    self._warn(field, "It is not supported and was left out.")
        return config

    def _formats(self, call: ModelCall) -> tuple[Json, list[str]]:
        image: Json = {}
        implied: list[str] = []
        for index, wanted in enumerate(call.response_formats):
            field = f"response_format[{index}]"
            match wanted["type"]:
                case "image":
                    # Image models answer with text beside the picture unless told otherwise.
                    implied += ["TEXT", "IMAGE"]
                    image = _image(wanted)
                    if "mime_type" in wanted:
                        self._warn(f"{field}.mime_type", "The model chooses the image's format.")
                case "audio":
                    implied.append("AUDIO")
                    self._audio(wanted, field)
                case kind:
                    raise Invalid(
                        f"The value '{kind}' is not supported for '{field}.type' with this model."
                    )
        for index, modality in enumerate(call.modalities):
            if modality not in _MODALITIES:
                raise Invalid(
                    f"The value '{modality}' is not supported for 'response_modalities[{index}]' "
                    "with this model."
                )
        asked = [modality.upper() for modality in call.modalities]
        return image, asked or list(dict.fromkeys(implied))

    def _audio(self, wanted: Json, field: str) -> None:
        if wanted.get("mime_type", _L16) != _L16:
            self._warn(f"{field}.mime_type", f"The model answers in {_L16}.")
        if wanted.get("sample_rate", _PCM_RATE) != _PCM_RATE:
            self._warn(f"{field}.sample_rate", f"The model answers at {_PCM_RATE} Hz.")
        if "bit_rate" in wanted:
            self._warn(f"{field}.bit_rate", "The model's audio is not compressed.")

    def _safety(self, settings: Sequence[Json]) -> list[Json]:
        if any("method" in setting for setting in settings):
            self._warn("safety_settings.method", "The Gemini API always rates by probability.")
        return [
            {
                "category": f"HARM_CATEGORY_{setting['type'].upper()}",
                "threshold": setting["threshold"].upper(),
            }
            for setting in settings
        ]


def _declaration(tool: Json) -> Json:
    declared: Json = {"name": tool["name"]}
    if tool.get("description"):
        declared["description"] = tool["description"]
    if tool.get("parameters"):
        declared["parametersJsonSchema"] = tool["parameters"]
    return declared


def _search(tool: Json, index: int) -> Json:
    types: Json = {}
    for kind in tool.get("search_types") or ():
        match kind:
            case "web_search":
                types["webSearch"] = {}
            case "image_search":
                types["imageSearch"] = {}
            case _:
                raise Invalid(
                    f"The value '{kind}' is not supported for 'tools[{index}].search_types' "
                    "with this model."
                )
    return {"searchTypes": types} if types else {}


def _file_search(tool: Json) -> Json:
    wire = {
        "file_search_store_names": "fileSearchStoreNames",
        "metadata_filter": "metadataFilter",
        "top_k": "topK",
    }
    return {wire[name]: tool[name] for name in wire if tool.get(name) is not None}


def _computer(tool: Json) -> Json:
    wire: Json = {"environment": f"ENVIRONMENT_{(tool.get('environment') or 'browser').upper()}"}
    if excluded := tool.get("excluded_predefined_functions"):
        wire["excludedPredefinedFunctions"] = excluded
    if "enable_prompt_injection_detection" in tool:
        wire["enablePromptInjectionDetection"] = tool["enable_prompt_injection_detection"]
    if policies := tool.get("disabled_safety_policies"):
        wire["disabledSafetyPolicies"] = [policy.upper() for policy in policies]
    return wire


def _speech(asked: Json | list[Json]) -> Json:
    speakers: list[Json] = asked if isinstance(asked, list) else (asked.get("speakers") or [asked])
    config: Json = {}
    languages = [one["language"] for one in speakers if one.get("language")]
    if languages:
        config["languageCode"] = languages[0]
    if len(speakers) == 1 and not speakers[0].get("speaker"):
        if speakers[0].get("voice"):
            config["voiceConfig"] = _voice(speakers[0]["voice"])
    else:
        voices = [
            {
                **({"speaker": one["speaker"]} if one.get("speaker") else {}),
                **({"voiceConfig": _voice(one["voice"])} if one.get("voice") else {}),
            }
            for one in speakers
        ]
        config["multiSpeakerVoiceConfig"] = {"speakerVoiceConfigs": voices}
    return config


def _voice(name: str) -> Json:
    if name.startswith(("voice_", "voicekey_")):
        return {"voice": name}
    return {"prebuiltVoiceConfig": {"voiceName": name}}


def _image(asked: Json) -> Json:
    wire = {"aspect_ratio": "aspectRatio", "image_size": "imageSize"}
    return {wire[name]: asked[name] for name in wire if asked.get(name) is not None}
