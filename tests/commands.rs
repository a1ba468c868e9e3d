//! The commands, as they are typed.

use std::{
    os::unix::fs::PermissionsExt,
    process::{Output, Stdio},
    time::Duration,
};

use sqlx::{ConnectOptions, Connection, Executor, PgConnection, PgPool};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::TcpListener,
    process::Command,
};

use crate::support::{
    Service, count, eventually, make_account,
    postgres::Cluster,
    process::{BINARY, HttpClient, Process, Signal, send_signal},
    proxy::{Network, Proxy},
    url,
};

/// In an empty directory, so that no `.env` of a developer plays a part.
fn payonce(arguments: &[&str]) -> Command {
    let mut command = Command::new(BINARY);
    command
        .args(arguments)
        .current_dir(std::env::temp_dir())
        .env_remove("RUST_LOG")
        .env_remove("DATABASE_URL")
        .env_remove("PAYONCE_URL")
        .env_remove("PAYONCE_API_KEY");
    command
}

async fn run(pool: &PgPool, arguments: &[&str]) -> Output {
    payonce(arguments)
        .env("DATABASE_URL", url(pool))
        .output()
        .await
        .unwrap()
}

async fn succeed(pool: &PgPool, arguments: &[&str]) -> String {
    let output = run(pool, arguments).await;
    assert!(output.status.success(), "{arguments:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// What a failed command says: one line, on standard error.
async fn fail(pool: &PgPool, arguments: &[&str]) -> String {
    let output = run(pool, arguments).await;
    assert!(!output.status.success(), "{arguments:?}: {output:?}");
    assert!(output.stdout.is_empty());
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(said.lines().count(), 1, "{said}");
    said
}

fn field<'a>(output: &'a str, name: &str) -> &'a str {
    output
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '))
        .unwrap_or_else(|| panic!("no {name} in {output:?}"))
}

#[sqlx::test(migrations = false)]
async fn from_an_empty_database_to_a_charge(pool: PgPool) {
    for command in [&["serve"][..], &["account", "create", "shop"], &["purge"]] {
        let said = fail(&pool, command).await;
        assert!(said.contains("`payonce migrate`"), "{said}");
    }
    succeed(&pool, &["migrate"]).await;
    succeed(&pool, &["migrate"]).await;
    let made = succeed(&pool, &["account", "create", "shop"]).await;
    assert_eq!(made.lines().count(), 2);
    let (account, api_key) = (field(&made, "account"), field(&made, "api_key"));

    let process = Process::serve(&url(&pool)).await;
    let reply = HttpClient::new(api_key)
        .charge(&process.address, "order_1")
        .await
        .unwrap();
    assert_eq!(reply.status, 200);
    assert!(process.terminate().await.success());

    let checked = payonce(&["api-key", "check"])
        .env("DATABASE_URL", url(&pool))
        .env("PAYONCE_API_KEY", api_key)
        .output()
        .await
        .unwrap();
    assert_eq!(
        String::from_utf8(checked.stdout).unwrap(),
        format!("account {account}\n")
    );
    let wrong = payonce(&["api-key", "check"])
        .env("DATABASE_URL", url(&pool))
        .env("PAYONCE_API_KEY", format!("sk_test_{}", "x".repeat(32)))
        .output()
        .await
        .unwrap();
    assert!(!wrong.status.success());
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn a_revoked_api_key_is_dead_within_five_seconds_and_the_others_live(pool: PgPool) {
    let made = succeed(&pool, &["account", "create", "shop"]).await;
    let (account, first) = (field(&made, "account"), field(&made, "api_key"));
    let made = succeed(&pool, &["api-key", "create", account]).await;
    let (second_id, second) = (field(&made, "api_key_id"), field(&made, "api_key"));
    assert_eq!(
        succeed(&pool, &["api-key", "list", account])
            .await
            .matches(" active\n")
            .count(),
        2
    );

    let service = Service::start(&pool).await;
    let with = |api_key: &str| {
        service
            .stranger("GET", "/v1/charges")
            .header("authorization", &format!("Bearer {api_key}"))
            .send()
    };
    assert_eq!(with(second).await.status, 200);
    succeed(&pool, &["api-key", "revoke", second_id]).await;
    let revoked = std::time::Instant::now();
    // Kept busy, so that being used does not keep it alive.
    let dead = || async { with(second).await.status == 401 };
    eventually("the key is dead", dead).await;
    assert!(revoked.elapsed() < Duration::from_secs(5));
    assert_eq!(with(first).await.status, 200);

    let list = succeed(&pool, &["api-key", "list", account]).await;
    assert_eq!(
        (
            list.matches(" active\n").count(),
            list.matches(" revoked ").count()
        ),
        (1, 1),
        "{list}"
    );
    assert!(!list.contains(first) && !list.contains(second));
    succeed(&pool, &["api-key", "revoke", second_id]).await;
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn a_mistake_is_named(pool: PgPool) {
    let nobody = "acct_00000000000000000000000000000000";
    assert!(
        fail(&pool, &["api-key", "create", nobody])
            .await
            .contains(nobody)
    );
    assert!(
        fail(&pool, &["api-key", "list", nobody])
            .await
            .contains(nobody)
    );
    let no_key = "ak_00000000000000000000000000000000";
    assert!(
        fail(&pool, &["api-key", "revoke", no_key])
            .await
            .contains(no_key)
    );

    for (arguments, variable, value, named) in [
        (&["serve"][..], "RULES", "payment=soon", "--rule"),
        (&["serve"], "RULES", "form=1h payment=0s", "--rule"),
        (
            &["serve"],
            "RULES",
            "payment=1h,skip",
            "a duplicate of payment can get: replay",
        ),
        (&["serve"], "RULES", "form=1h form=2h", "form has two rules"),
        (&["serve"], "KEYLESS", "yes", "--keyless"),
        (&["serve"], "RATE_LIMIT", "-1", "--rate-limit"),
        (
            &["serve"],
            "AUTH_FAILURE_LIMIT",
            "-1",
            "--auth-failure-limit",
        ),
        (&["serve"], "CONNECTIONS_MAX", "0", "--connections-max"),
        (&["serve"], "DUPLICATE_GUARD", "on", "--duplicate-guard"),
        (&["serve"], "DUPLICATE_WAIT", "11s", "--duplicate-wait"),
        (&["serve"], "BATCH_MAX", "0", "--batch-max"),
        (&["serve"], "QUEUE_MAX", "-1", "--queue-max"),
        (&["serve"], "POOL_SIZE", "many", "--pool-size"),
        (&["serve"], "LOG_FORMAT", "xml", "--log-format"),
        (
            &["serve"],
            "LISTEN_ADDR",
            "nowhere",
            "cannot listen on nowhere",
        ),
        (
            &["serve"],
            "LISTEN_ADDR",
            "127.0.0.1:99999",
            "cannot listen on 127.0.0.1:99999",
        ),
        (&["api-key", "list", "42"], "X", "x", "acct_"),
        (&["account", "create", " "], "X", "x", "1 to 200 characters"),
    ] {
        let output = payonce(arguments)
            .env("DATABASE_URL", url(&pool))
            .env(variable, value)
            .output()
            .await
            .unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success());
        assert!(said.contains(named), "{variable}={value}: {said}");
    }
}

/// How a command ended, and the one line that it said.
async fn one_line(command: &mut Command) -> (i32, String) {
    let output = command.output().await.unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(said.lines().count(), 1, "{said}");
    (output.status.code().unwrap(), said)
}

#[tokio::test]
async fn what_is_wrong_with_the_database_url_is_named() {
    for url in [None, Some("")] {
        for command in ["serve", "migrate", "purge"] {
            let mut command = payonce(&[command]);
            if let Some(url) = url {
                command.env("DATABASE_URL", url);
            }
            let (code, said) = one_line(&mut command).await;
            assert_eq!(code, 2, "{said}");
            assert!(said.contains("DATABASE_URL is not set"), "{said}");
            assert!(said.contains("postgres://user:password@"), "{said}");
        }
    }
    for (url, named) in [
        ("garbage-hunter2", "a URL like postgres://user:password@"),
        ("mysql://u:hunter2@127.0.0.1:1/db", "not mysql://"),
        ("postgres://u:hunter2@3@127.0.0.1:1/db", "%40"),
        ("postgres://u:hunter2/3@127.0.0.1:1/db", "%2F"),
        ("postgres://u:hunter2@127.0.0.1:port/db", "the port"),
        (
            "postgres://u:hunter2@127.0.0.1:1,127.0.0.1:2/db",
            "several hosts",
        ),
        (
            "postgres://u:hunter2@h/db?host=127.0.0.1,127.0.0.2",
            "several hosts",
        ),
        (
            "postgres://u:hunter2@127.0.0.1:1/db?target_session_attrs=read-write",
            "target_session_attrs",
        ),
    ] {
        for command in ["serve", "migrate"] {
            let (code, said) = one_line(payonce(&[command]).env("DATABASE_URL", url)).await;
            assert_eq!(code, 2, "{said}");
            assert!(
                said.contains("DATABASE_URL cannot be used") && said.contains(named),
                "{url}: {said}"
            );
            assert!(!said.contains("hunter2"), "{said}");
        }
    }
    let nowhere = "postgres://u:hunter2@127.0.0.1:1/db";
    let (code, said) = one_line(payonce(&["migrate"]).env("DATABASE_URL", nowhere)).await;
    assert_eq!(code, 1);
    assert!(said.contains("PostgreSQL at 127.0.0.1:1"), "{said}");
    assert!(!said.contains("hunter2"), "{said}");
}

/// As far as the version that it tells, which is where payonce has to stop.
async fn server_of_version(version: &'static str) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let length = stream.read_u32().await.unwrap();
            let mut startup = vec![0; length as usize - 4];
            stream.read_exact(&mut startup).await.unwrap();
            let status = format!("server_version\0{version}\0");
            let mut answer = b"R\0\0\0\x08\0\0\0\0S".to_vec();
            answer.extend(u32::try_from(status.len() + 4).unwrap().to_be_bytes());
            answer.extend(status.bytes());
            answer.extend(b"Z\0\0\0\x05I");
            stream.write_all(&answer).await.unwrap();
            // Whoever asks it something gets no answer.
            let _ = stream.read(&mut startup).await;
        }
    });
    format!("postgres://u@{address}/db?sslmode=disable")
}

#[tokio::test]
async fn a_postgresql_that_is_too_old_is_refused_by_its_version() {
    let url = server_of_version("14.19 (Debian 14.19-1.pgdg13+1)").await;
    for arguments in [&["serve"][..], &["migrate"], &["account", "create", "shop"]] {
        let (code, said) = one_line(payonce(arguments).env("DATABASE_URL", &url)).await;
        assert_eq!(code, 1);
        assert!(
            said.contains("PostgreSQL 14.19 is too old: payonce needs PostgreSQL 15 or later"),
            "{said}"
        );
    }
}

#[tokio::test]
async fn a_line_of_the_env_file_that_cannot_be_read_is_named_by_its_number() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join(".env");
    std::fs::write(
        &file,
        "# RULES=hunter2 x\n\nLOG_FORMAT=json\nRULES=hunter2 x\n",
    )
    .unwrap();
    let (code, said) = one_line(payonce(&["rules"]).current_dir(directory.path())).await;
    assert_eq!(code, 2);
    assert!(
        said.contains(".env, line 4: ") && said.contains("quotes"),
        "{said}"
    );
    assert!(!said.contains("hunter2"), "{said}");
}

#[tokio::test]
async fn a_usage_asks_only_for_what_is_required_and_a_wrong_variable_is_named() {
    let output = payonce(&["charge", "--amount", "5000"])
        .env("PAYONCE_URL", "http://127.0.0.1:1")
        .env("LOG_FORMAT", "json")
        .output()
        .await
        .unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2));
    let usage = said.lines().find(|line| line.starts_with("Usage: "));
    assert_eq!(
        usage,
        Some("Usage: payonce charge [OPTIONS] --amount <N> --currency <CODE>"),
        "{said}"
    );
    for (arguments, variable, value) in [
        (&["serve"][..], "BATCH_MAX", "many"),
        (&["serve"], "LOG_FORMAT", "xml"),
        (&["storm"], "PAYONCE_URL", "nowhere"),
    ] {
        let output = payonce(arguments)
            .env(variable, value)
            .output()
            .await
            .unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2));
        assert!(said.contains(&format!("the variable {variable}")), "{said}");
    }
    // The flag is what is wrong here.
    let output = payonce(&["serve", "--batch-max=few"])
        .env("BATCH_MAX", "many")
        .output()
        .await
        .unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(
        said.contains("'few'") && !said.contains("the variable"),
        "{said}"
    );
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn an_api_key_comes_from_the_environment_a_file_or_standard_input(pool: PgPool) {
    let (account, api_key) = make_account(&pool).await;
    let process = Process::serve(&url(&pool)).await;
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("api_key");
    std::fs::write(&file, format!("{api_key}\n")).unwrap();
    let file = file.to_str().unwrap();

    let charge = ["charge", "--amount", "5000", "--currency", "usd"];
    for (i, more) in [&[][..], &["--api-key-file", file], &["--api-key-file", "-"]]
        .into_iter()
        .enumerate()
    {
        let mut command = payonce(&[&charge[..], more].concat());
        command
            .env("PAYONCE_URL", format!("http://{}", process.address))
            // What is named is taken, whatever the environment says.
            .env(
                "PAYONCE_API_KEY",
                if i == 0 { &api_key } else { "sk_test_other" },
            )
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut stdin = child.stdin.take().unwrap();
        stdin.write_all(api_key.as_bytes()).await.unwrap();
        drop(stdin);
        let output = child.wait_with_output().await.unwrap();
        assert!(output.status.success(), "{more:?}: {output:?}");
    }
    assert_eq!(count(&pool, "charges").await, 3);
    let checked = succeed(&pool, &["api-key", "check", "--api-key-file", file]).await;
    assert_eq!(checked, format!("account {account}\n"));

    for command in [&charge[..], &["storm"], &["api-key", "check"]] {
        let (code, said) = one_line(payonce(command).env("PAYONCE_API_KEY", "")).await;
        assert_eq!(code, 2);
        assert!(
            said.contains("PAYONCE_API_KEY is not set") && said.contains("--api-key-file"),
            "{said}"
        );
        for (file, named) in [
            ("/nowhere/api_key", "/nowhere/api_key"),
            ("/dev/null", "--api-key-file has to hold one API key"),
            (api_key.as_str(), "the name of a file"),
        ] {
            let arguments = [command, &["--api-key-file", file]].concat();
            let (code, said) = one_line(&mut payonce(&arguments)).await;
            assert_eq!(code, 2);
            assert!(said.contains(named) && !said.contains(&api_key), "{said}");
        }
        // Everybody could read it in the list of processes.
        let output = payonce(&[command, &["--api-key", &api_key]].concat())
            .output()
            .await
            .unwrap();
        assert_eq!(output.status.code(), Some(2));
    }
}

/// Runs it for a reader who has seen enough before anything is written.
async fn unread(command: &mut Command) -> Output {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let child = command
        .stdout(writer)
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.wait_with_output().await.unwrap()
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn a_reader_that_has_seen_enough_is_no_error(pool: PgPool) {
    for arguments in [
        &["openapi"][..],
        &["rules"],
        &["key", "mint"],
        &["--help"],
        &["serve", "--help"],
    ] {
        let output = unread(&mut payonce(arguments)).await;
        assert!(output.status.success(), "{arguments:?}: {output:?}");
        assert!(output.stderr.is_empty(), "{arguments:?}: {output:?}");
    }
    // Nor is one of what is said beside it.
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let status = payonce(&["migrate"])
        .env("DATABASE_URL", url(&pool))
        .stderr(writer)
        .status()
        .await
        .unwrap();
    assert!(status.success(), "{status:?}");
    // But an API key that nobody has seen is lost.
    let create = &mut payonce(&["account", "create", "shop"]);
    let output = unread(create.env("DATABASE_URL", url(&pool))).await;
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("could not be shown and is lost"), "{said}");
}

#[tokio::test]
async fn the_help_of_a_small_command_is_short() {
    let output = payonce(&["purge", "--help"]).output().await.unwrap();
    let help = String::from_utf8(output.stdout).unwrap();
    assert!(help.contains("--log-format"));
    assert!(help.lines().count() <= 10, "{help}");
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn health_says_whether_the_service_is_ready(pool: PgPool) {
    let proxy = Proxy::to(&pool).await;
    let through = proxy.options(&pool.connect_options()).to_url_lossy();
    let process = Process::serve(through.as_str()).await;
    let (_, port) = process.address.rsplit_once(':').unwrap();
    let everywhere = format!("0.0.0.0:{port}");
    for address in [&process.address, &everywhere] {
        let output = payonce(&["health"])
            .env("LISTEN_ADDR", address)
            // A proxy has no say between two programs of one machine.
            .env("HTTP_PROXY", "http://127.0.0.1:1")
            .output()
            .await
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        assert_eq!(output.stdout, b"ready\n");
    }
    proxy.set(Network::Down);
    let away = payonce(&["health"])
        .env("LISTEN_ADDR", &everywhere)
        .output()
        .await
        .unwrap();
    assert_eq!(away.status.code(), Some(1), "{away:?}");
    proxy.set(Network::Well);

    let address = process.address.clone();
    assert!(process.terminate().await.success());
    let (code, said) = one_line(payonce(&["health"]).env("LISTEN_ADDR", &address)).await;
    assert_eq!(code, 1);
    assert!(
        said.contains(&format!("http://{address}/readyz does not answer")),
        "{said}"
    );
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn whoever_has_no_account_is_told_how_to_make_one(pool: PgPool) {
    let no_account = async |known: &str| {
        let mut serve = payonce(&["serve"])
            .env("DATABASE_URL", url(&pool))
            .env("LISTEN_ADDR", "127.0.0.1:0")
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(serve.stderr.take().unwrap()).lines();
        while !lines.next_line().await.unwrap().unwrap().contains(known) {}
        send_signal(serve.id(), Signal::TERM).unwrap();
        let mut told = false;
        while let Some(line) = lines.next_line().await.unwrap() {
            told |= line.contains("payonce account create");
        }
        told
    };
    // The line comes after the one that the service listens, if it comes.
    assert!(no_account("listening").await);
    make_account(&pool).await;
    assert!(!no_account("listening").await);
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn a_password_is_not_repeated(pool: PgPool) {
    let (host, port) = (
        pool.connect_options().get_host().to_owned(),
        pool.connect_options().get_port(),
    );
    for url in [
        format!("postgres://payonce:hunter2@{host}:{port}/nowhere"),
        "postgres://payonce:hunter2@host:port/x".to_owned(),
    ] {
        for arguments in [&["serve"][..], &["migrate"], &["serve", "--help"]] {
            let output = payonce(arguments)
                .env("DATABASE_URL", &url)
                .output()
                .await
                .unwrap();
            let said = format!("{output:?}");
            assert!(!said.contains("hunter2"), "{said}");
        }
    }
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn an_empty_variable_counts_as_unset(pool: PgPool) {
    let made = payonce(&["account", "create", "shop"])
        .env("DATABASE_URL", url(&pool))
        .env("LOG_FORMAT", "")
        .env("RUST_LOG", "")
        .output()
        .await
        .unwrap();
    assert!(made.status.success(), "{made:?}");
    let missing = payonce(&["migrate"])
        .env("DATABASE_URL", "")
        .output()
        .await
        .unwrap();
    assert!(
        String::from_utf8(missing.stderr)
            .unwrap()
            .contains("DATABASE_URL is not set")
    );
    let mut serve = payonce(&["serve"]);
    for variable in [
        "RULES",
        "KEYLESS",
        "DUPLICATE_GUARD",
        "DUPLICATE_GUARD_WINDOW",
        "DUPLICATE_WAIT",
        "BATCH_MAX",
        "QUEUE_MAX",
        "POOL_SIZE",
        "CONNECTIONS_MAX",
        "AUTH_FAILURE_LIMIT",
        "PURGE_INTERVAL",
        "SHUTDOWN_TIMEOUT",
    ] {
        serve.env(variable, "");
    }
    // It gets as far as the address, so all the others were taken as unset.
    let output = serve
        .env("DATABASE_URL", url(&pool))
        .env("LISTEN_ADDR", "nowhere")
        .output()
        .await
        .unwrap();
    assert!(
        String::from_utf8(output.stderr)
            .unwrap()
            .contains("cannot listen on nowhere")
    );
}

#[tokio::test]
async fn every_setting_stands_in_the_help_and_in_the_example() {
    let help = payonce(&["serve", "--help"]).output().await.unwrap();
    let help = String::from_utf8(help.stdout).unwrap();
    let example = include_str!("../.env.example");
    let variables: Vec<_> = help
        .split("[env: ")
        .skip(1)
        .map(|rest| rest.split(['=', ']']).next().unwrap())
        .collect();
    assert!(variables.len() >= 10, "{help}");
    for variable in variables {
        assert!(
            example.contains(&format!("{variable}=")),
            "{variable} is missing in .env.example"
        );
    }
}

/// What .env says holds for the service that compose starts, but for where
/// things are, which compose decides.
#[tokio::test]
async fn every_setting_reaches_the_service_that_compose_starts() {
    let help = payonce(&["serve", "--help"]).output().await.unwrap();
    let help = String::from_utf8(help.stdout).unwrap();
    let compose = include_str!("../docker-compose.yml");
    let example = include_str!("../.env.example");
    let variables = help
        .split("[env: ")
        .skip(1)
        .map(|rest| rest.split(['=', ']']).next().unwrap())
        .filter(|variable| !["DATABASE_URL", "LISTEN_ADDR"].contains(variable))
        .chain(["RUST_LOG"]);
    for variable in variables {
        assert!(
            compose.contains(&format!("    {variable}: ${{{variable}:-}}\n")),
            "{variable} does not reach the service"
        );
    }
    for port in ["POSTGRES_PORT", "PAYONCE_PORT"] {
        assert!(compose.contains(&format!("${{{port}:-")));
        assert!(example.contains(&format!("\n{port}=")), "{port}");
    }
    // sqlx's own CLI takes an empty one for a URL.
    assert!(!example.lines().any(|line| line.trim() == "DATABASE_URL="));
}

#[tokio::test]
async fn rules_are_shown_with_their_changes() {
    let output = payonce(&["rules", "--rule", "webhook=14d"])
        .env("RULES", "")
        .output()
        .await
        .unwrap();
    let shown = String::from_utf8(output.stdout).unwrap();
    insta::assert_snapshot!(shown);
}

/// Without a database, or the name of one.
async fn key(arguments: &str) -> Output {
    let arguments: Vec<_> = std::iter::once("key")
        .chain(arguments.split_whitespace())
        // As a shell has it.
        .map(|argument| if argument == "''" { "" } else { argument })
        .collect();
    payonce(&arguments).output().await.unwrap()
}

#[tokio::test]
async fn a_key_is_printed_alone() {
    let window = "--window 10m --at 2026-07-01T14:07:31+02:00";
    let sha256_of_the_data = "d3626ac30a87e6f7a6428233b3c68299976865fa5508e4267c5415c76af7a772";
    for (arguments, expected) in [
        (
            "payment --order order_1 --amount 5000 --version 2".to_owned(),
            "payment:order_1:5000:v2".to_owned(),
        ),
        (
            "payment --order 1:2 --amount 1".to_owned(),
            "payment:1%3A2:1:v1".to_owned(),
        ),
        (
            format!("form --user user_7 --form signup {window}"),
            "form:user_7:signup:20260701T120000Z:600s".to_owned(),
        ),
        (
            format!("form --user user_7 --form signup {window} --previous"),
            "form:user_7:signup:20260701T115000Z:600s".to_owned(),
        ),
        (
            "webhook --source stripe --event evt_1".to_owned(),
            "webhook:stripe:evt_1".to_owned(),
        ),
        ("message --id msg_1".to_owned(), "message:msg_1".to_owned()),
        (
            "email --recipient ada@example.com --template welcome --day 2026-07-01".to_owned(),
            "email:ce9ea766e9dd4bb53d85eec2130f4ec51df8665ffc0de62f7ad64c0c7f106743:welcome:2026-07-01"
                .to_owned(),
        ),
        (
            format!("compound --entity cart_3 --action checkout {window} --data {{\"b\":1,\"a\":2}}"),
            format!("compound:cart_3:checkout:20260701T120000Z:600s:{sha256_of_the_data}"),
        ),
        (
            format!("compound --entity cart_3 --action checkout {window} --previous --data {{\"a\":2,\"b\":1}}"),
            format!("compound:cart_3:checkout:20260701T115000Z:600s:{sha256_of_the_data}"),
        ),
    ] {
        let output = key(&arguments).await;
        assert!(output.status.success(), "{arguments}: {output:?}");
        assert_eq!(
            String::from_utf8(output.stdout).unwrap(),
            format!("{expected}\n")
        );
        assert!(output.stderr.is_empty(), "{arguments}");
    }
    let (one, other) = (key("mint").await, key("mint").await);
    assert!(one.status.success() && one.stdout.len() == 37, "{one:?}");
    assert_ne!(one.stdout, other.stdout);
}

#[tokio::test]
async fn a_window_is_the_current_one_unless_told() {
    let year = "form --user u --form f --window 366d";
    let now = chrono::DateTime::from(std::time::SystemTime::now());
    let start = payonce::key_builder::Window::of(Duration::from_hours(366 * 24), now)
        .unwrap()
        .start()
        .format("%Y%m%dT%H%M%SZ");
    assert_eq!(
        String::from_utf8(key(year).await.stdout).unwrap(),
        format!("form:u:f:{start}:31622400s\n")
    );
}

/// Refused with this status, without a key, and with these words.
async fn refused(status: i32, arguments: &str, named: &str) {
    let output = key(arguments).await;
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(status), "{arguments}: {said}");
    assert!(output.stdout.is_empty(), "{arguments}");
    assert!(said.contains(named), "{arguments}: {said}");
    // clap quotes the mistake and adds the usage; ours is one line, without it.
    if status == 1 {
        assert_eq!(said.lines().count(), 1, "{said}");
        assert!(!said.contains("secret"), "{said}");
    }
}

#[tokio::test]
async fn a_key_without_one_of_its_fields_is_refused_by_its_name() {
    for (arguments, named) in [
        ("payment --order '' --amount 1", "order"),
        ("form --user '' --form f --window 1m", "user"),
        ("form --user u --form '' --window 1m", "form"),
        ("webhook --source '' --event e", "source"),
        ("webhook --source s --event ''", "event"),
        ("message --id ''", "id"),
        (
            "email --recipient '' --template t --day 2026-07-01",
            "recipient",
        ),
        (
            "email --recipient r --template '' --day 2026-07-01",
            "template",
        ),
        (
            "compound --entity '' --action a --window 1h --data {}",
            "entity",
        ),
        (
            "compound --entity e --action '' --window 1h --data {}",
            "action",
        ),
    ] {
        refused(1, arguments, &format!("the {named} is empty")).await;
    }
    refused(2, "payment --order o", "--amount").await;
    refused(2, "form --user u --form f", "--window").await;
    refused(2, "compound --entity e --action a --window 1h", "--data").await;
}

#[tokio::test]
async fn a_key_of_what_cannot_be_meant_is_refused() {
    let between = "a whole number from 1 to 999999999999";
    let rfc3339 = "like 2026-07-01T12:00:00Z";
    for (status, arguments, named) in [
        (2, "payment --order o --amount 0", between),
        (2, "payment --order o --amount -5", between),
        (2, "payment --order o --amount 1.5", between),
        (2, "payment --order o --amount 1000000000000", between),
        (2, "payment --order o --amount 1 --version two", "--version"),
        (2, "form --user u --form f --window 0s", "more than 0"),
        (
            2,
            "form --user u --form f --window soon",
            "24h, 90s or 250ms",
        ),
        (1, "form --user u --form f --window 250ms", "whole seconds"),
        (1, "form --user u --form f --window 367d", "366 days"),
        (2, "form --user u --form f --window 1m --at noon", rfc3339),
        (
            2,
            "form --user u --form f --window 1m --at 2026-07-01T12:00:00",
            rfc3339,
        ),
        (
            1,
            "form --user u --form f --window 1m --at 1969-07-01T12:00:00Z",
            "1970 to 9999",
        ),
        (
            2,
            "email --recipient r --template t --day 2026-02-29",
            "like 2026-07-01",
        ),
        (
            2,
            "email --recipient r --template t --day 2026-7-1",
            "like 2026-07-01",
        ),
        (
            1,
            "compound --entity e --action a --window 1h --data {secret",
            "not valid JSON (line 1, column 2)",
        ),
        (
            1,
            r#"compound --entity e --action a --window 1h --data {"a":1,"a":2}"#,
            "a field twice",
        ),
        (
            1,
            "compound --entity e --action a --window 1h --data 9007199254740993",
            "write it as a text",
        ),
    ] {
        refused(status, arguments, named).await;
    }
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn purge_says_how_much_it_did(pool: PgPool) {
    let service = Service::start(&pool).await;
    for i in 0..3 {
        service.charge(&format!("order_{i}")).send().await;
    }
    sqlx::query("update idempotency_keys set expires_at = now() where key <> 'order_0'")
        .execute(&pool)
        .await
        .unwrap();
    let output = run(&pool, &["purge"]).await;
    assert!(
        String::from_utf8(output.stderr)
            .unwrap()
            .contains("purged 2 expired answers")
    );
    assert_eq!(count(&pool, "idempotency_keys").await, 1);
}

/// A row's number names one row of a plain table; on others a purge, or a charge that is
/// taken back, would hit strangers' rows.
#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn tables_that_are_not_plain_are_refused(pool: PgPool) {
    sqlx::raw_sql(
        "alter table charges rename to plain;
         create table charges (like plain) partition by hash (account_id);
         create table charges_0 partition of charges for values with (modulus 1, remainder 0)",
    )
    .execute(&pool)
    .await
    .unwrap();
    for command in [&["serve", "--listen-addr", "127.0.0.1:0"][..], &["purge"]] {
        let refused = fail(&pool, command).await;
        assert!(refused.contains("charges is partitioned"), "{refused}");
    }
    sqlx::raw_sql(
        "drop table charges; alter table plain rename to charges;
         create table special () inherits (refunds)",
    )
    .execute(&pool)
    .await
    .unwrap();
    for command in [&["serve", "--listen-addr", "127.0.0.1:0"][..], &["purge"]] {
        let refused = fail(&pool, command).await;
        assert!(refused.contains("refunds is inherited from"), "{refused}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_can_lose_charges_is_refused() {
    for (name, setting) in [
        ("test-fsync", "fsync=off"),
        ("test-fpw", "full_page_writes=off"),
    ] {
        let cluster = Cluster::start_with(name, &["-c", setting]).await;
        let output = payonce(&["serve"])
            .env("DATABASE_URL", &cluster.url)
            .output()
            .await
            .unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success() && said.contains(setting), "{said}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_cannot_hold_every_text_is_refused() {
    let cluster = Cluster::start_with("test-encoding", &[]).await;
    let mut conn = PgConnection::connect(&cluster.url).await.unwrap();
    conn.execute("create database latin encoding 'SQL_ASCII' locale 'C' template template0")
        .await
        .unwrap();
    let mut url = reqwest::Url::parse(&cluster.url).unwrap();
    url.set_path("latin");
    for (command, fits) in [("migrate", true), ("serve", false)] {
        let output = payonce(&[command])
            .env("DATABASE_URL", url.as_str())
            .output()
            .await
            .unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.success(), fits, "{said}");
        assert!(fits || said.contains("UTF8"), "{said}");
    }
}

/// Before PostgreSQL is looked for, and perhaps installed.
#[tokio::test]
async fn a_toolchain_that_is_too_old_or_missing_is_named_first() {
    let directory = tempfile::tempdir().unwrap();
    let path = std::env::var("PATH").unwrap();
    let old = directory.path().join("cargo");
    std::fs::write(
        &old,
        "#!/bin/sh\necho 'cargo 1.70.0 (ec8a8a0ca 2023-04-25)'\n",
    )
    .unwrap();
    std::fs::set_permissions(&old, std::fs::Permissions::from_mode(0o755)).unwrap();
    for script in ["run", "test"] {
        let (code, said) = one_line(
            Command::new(format!("{}/scripts/{script}", env!("CARGO_MANIFEST_DIR")))
                .env("PATH", format!("{}:{path}", directory.path().display()))
                .env("LISTEN_ADDR", "127.0.0.1:1"),
        )
        .await;
        assert_eq!(code, 1, "{said}");
        assert!(
            said.contains("needs Rust 1.94") && said.contains("cargo 1.70.0"),
            "{said}"
        );
    }
}

/// Whose line the compiler would not name, though it fails over it.
#[tokio::test]
async fn a_line_of_the_env_file_is_named_before_anything_is_built() {
    let directory = tempfile::tempdir().unwrap();
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let script = directory.path().join("scripts/toolchain");
    std::fs::create_dir(directory.path().join("scripts")).unwrap();
    std::fs::copy(root.join("scripts/toolchain"), &script).unwrap();
    std::fs::copy(root.join("Cargo.toml"), directory.path().join("Cargo.toml")).unwrap();
    let env = directory.path().join(".env");
    std::fs::write(&env, "# RULES=a b\nA=\"1\nb c\n\"\nRULES=hunter2 x\n").unwrap();
    let (code, said) = one_line(&mut Command::new(&script)).await;
    assert_eq!(code, 1);
    assert!(
        said.contains(".env, line 5: ") && !said.contains("hunter2"),
        "{said}"
    );
    std::fs::copy(root.join(".env.example"), &env).unwrap();
    assert!(Command::new(&script).status().await.unwrap().success());
}
