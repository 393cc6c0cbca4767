"""What sandboxes connect to: rules, their changes, and the record."""

import asyncio
import json
import socket

import pytest
from aiohttp import web

from openinteractions.resources.environments.schemas import Configuration
from tests.broker.test_life import eventually

CURL = "curl -sS -m 10 -o /dev/null -w '%{http_code}' --noproxy '' -x http://127.0.0.1:3128 "


@pytest.fixture
async def site():
    """A host on this machine; its port."""

    async def hello(_):
        return web.Response(text="hello")

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", hello)
    runner = web.AppRunner(app)
    await runner.setup()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        await web.SockSite(runner, listener).start()
        yield listener.getsockname()[1]
        await runner.cleanup()


async def start(stage, port, **settings):
    await stage.start(
        OI_NETWORK__ALLOW='["127.0.0.0/8", "::1/128"]', OI_SANDBOX__PORTS=f"[{port}]", **settings
    )


async def logged(stage, env):
    return await stage.fetch(
        "select host, port, kind, method, path, decision, reason, status, project_id "
        "from egress_log where environment_id = $1 order by id",
        env,
    )


async def change(stage, env, network):
    sealed = stage.seal(env, Configuration(network=network))
    await stage.fetch(
        "update environments set sealed = $2, revision = revision + 1 where id = $1", env, sealed
    )


async def test_requests_are_allowed_refused_and_recorded(stage, site):
    await start(stage, site)
    env = await stage.environment(network={"allowlist": [{"domain": "localhost"}]})
    url = f"http://localhost:{site}/a/b?secret=1"
    assert await stage.sh(env, CURL + f"'{url}'") == "200"
    assert await stage.sh(env, CURL + f"'http://elsewhere.example:{site}/'") == "403"
    await eventually(lambda: two(stage, env))
    allowed, refused = await logged(stage, env)
    assert allowed["decision"] == "allowed"
    assert (allowed["host"], allowed["port"], allowed["kind"]) == ("localhost", site, "http")
    assert (allowed["method"], allowed["path"], allowed["status"]) == ("GET", "/a/b", 200)
    assert allowed["project_id"] == stage.project_id
    assert (refused["decision"], refused["host"]) == ("refused", "elsewhere.example")
    assert "allowlist" in refused["reason"]


async def two(stage, env):
    return len(await logged(stage, env)) == 2


async def test_changed_rules_hold_at_once(stage, site):
    await start(stage, site)
    env = await stage.environment(network="disabled")
    url = f"http://localhost:{site}/"
    assert await stage.sh(env, CURL + url) == "403"
    # Told so.
    await change(stage, env, {"allowlist": [{"domain": "*"}]})
    await stage.client.refresh(stage.address, env)
    assert await stage.sh(env, CURL + url) == "200"
    # Not told: the next command finds out.
    await change(stage, env, "disabled")
    assert await stage.sh(env, CURL + url) == "403"


async def test_the_operators_default_and_ceiling_hold(stage, site):
    await start(
        stage,
        site,
        OI_SANDBOX__NETWORK__MODE="disabled",
        OI_SANDBOX__CEILING__MODE="allowlist",
        OI_SANDBOX__CEILING__DOMAINS='["other.example"]',
    )
    url = f"http://localhost:{site}/"
    silent = await stage.environment()
    assert await stage.sh(silent, CURL + url) == "403"
    wide = await stage.environment(network={"allowlist": [{"domain": "*"}]})
    assert await stage.sh(wide, CURL + url) == "403"


async def test_an_adopted_sandbox_has_its_way_out_again(stage, site):
    await start(stage, site)
    env = await stage.environment(network={"allowlist": [{"domain": "localhost"}]})
    assert await stage.sh(env, CURL + f"http://localhost:{site}/") == "200"
    stage.kill()
    await start(stage, site)
    assert await stage.sh(env, CURL + f"http://localhost:{site}/") == "200"
    assert await stage.sh(env, CURL + f"http://elsewhere.example:{site}/") == "403"


async def test_a_credential_is_a_placeholder_inside(broker):
    env = await broker.environment(
        env={"KEY": {"credential": "credentials/github"}, "PLAIN": {"value": "x y"}}
    )
    assert await broker.sh(env, 'echo "$KEY|$PLAIN"') == "__GEMINI_CRED_github__|x y\n"


async def test_sandboxes_trust_our_certificates_and_know_the_proxy(broker):
    env = await broker.environment()
    text = await broker.sh(env, "tail -c 2000 $SSL_CERT_FILE; env | grep -i _proxy | sort")
    authority = (broker.home / "sandboxes/egress-ca.pem").read_text()
    ours = authority[authority.index("-----BEGIN CERTIFICATE") :].strip()
    assert ours in text
    names = [line.partition("=")[0] for line in text.splitlines() if "_proxy=" in line.lower()]
    assert names == sorted(
        ["HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy"],
        key=names.index,
    )
    assert len(names) == 6


async def test_decisions_wait_for_a_database_that_is_away(stage, site, cluster):
    await start(stage, site)
    env = await stage.environment()
    command = stage.shell("sleep 1.5; " + CURL + f"http://localhost:{site}/")
    running = asyncio.ensure_future(stage.run(env, command))
    await eventually(lambda: begun(stage))
    name = stage.url.split("@/")[1].split("?")[0]
    await cluster.execute(f'alter database "{name}" allow_connections false')
    await cluster.execute(
        f"select pg_terminate_backend(pid) from pg_stat_activity where datname = '{name}'"
    )
    ran = await asyncio.wait_for(running, 30)
    assert ran.out == b"200", json.dumps(stage.events()[-5:])
    await eventually(lambda: stage.events("egress.log_failed"))
    await cluster.execute(f'alter database "{name}" allow_connections true')
    await eventually(lambda: one(stage, env))


async def begun(stage):
    return any(each["executions"] for each in await stage.client.environments(stage.address))


async def one(stage, env):
    return len(await logged(stage, env)) == 1
