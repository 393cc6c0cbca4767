"""The tools on files, by name."""

from collections.abc import Mapping

from openinteractions.models.port import Json
from openinteractions.tools.port import Means, Tool
from openinteractions.tools.workspace import changing, listing, reading, searching
from openinteractions.tools.workspace.tool import FileTool


def tools(config: Json, means: Means) -> Mapping[str, Tool]:
    """All of them: they come with an environment."""
    del config
    place = means.workplace
    found = (
        FileTool(
            name="read_file",
            description=reading.READ_FILE,
            parameters=reading.READ_FILE_PARAMETERS,
            work=reading.read_file,
            is_pure=True,
            place=place,
        ),
        FileTool(
            name="write_file",
            description=changing.WRITE_FILE,
            parameters=changing.WRITE_FILE_PARAMETERS,
            work=changing.write_file,
            is_pure=False,
            place=place,
        ),
        FileTool(
            name="edit_file",
            description=changing.EDIT_FILE,
            parameters=changing.EDIT_FILE_PARAMETERS,
            work=changing.edit_file,
            is_pure=False,
            place=place,
        ),
        FileTool(
            name="list_files",
            description=listing.LIST_FILES,
            parameters=listing.LIST_FILES_PARAMETERS,
            work=listing.list_files,
            is_pure=True,
            place=place,
        ),
        FileTool(
            name="search_files",
            description=searching.SEARCH_FILES,
            parameters=searching.SEARCH_FILES_PARAMETERS,
            work=searching.search_files,
            is_pure=True,
            place=place,
            executions=searching.executions,
        ),
        FileTool(
            name="delete_file",
            description=changing.DELETE_FILE,
            parameters=changing.DELETE_FILE_PARAMETERS,
            work=changing.delete_file,
            is_pure=False,
            place=place,
        ),
        FileTool(
            name="view_image",
            description=reading.VIEW_IMAGE,
            parameters=reading.VIEW_IMAGE_PARAMETERS,
            work=reading.view_image,
            is_pure=True,
            place=place,
        ),
    )
    return {tool.name: tool for tool in found}
