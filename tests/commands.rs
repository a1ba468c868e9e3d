//! The commands, as they are typed.

use std::{process::Output, time::Duration};

use sqlx::{Connection, Executor, PgConnection, PgPool};
use tokio::process::Command;

use crate::support::{
    Service, count, eventually,
    postgres::Cluster,
    process::{BINARY, HttpClient, Process},
    url,
};

/// In an empty directory, so that no `.env` of a developer plays a part.
fn payonce(arguments: &[&str]) -> Command {
    let mut command = Command::new(BINARY);
    command
        .args(arguments)
        .current_dir(std::env::temp_dir())
        .env_remove("RUST_LOG")
        .env_remove("DATABASE_URL");
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
    let output = payonce(&["serve"]).output().await.unwrap();
    assert!(
        String::from_utf8(output.stderr)
            .unwrap()
            .contains("--database-url")
    );
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
            .contains("required")
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
    let start = payonce::keys::Window::of(Duration::from_hours(366 * 24), now)
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
