//! Promise 4: same key, other request: refused.

use std::{fmt::Write, time::Duration};

use futures::future::join_all;
use payonce::{
    error::Error,
    http::{DuplicateGuard, Keyless},
    idempotency::{FieldDigests, Fingerprint, purge},
    writer::Command,
};
use serde_json::json;
use sha2::{Digest, Sha256};
use sqlx::{AssertSqlSafe, Executor, PgPool};
use tokio::time::Instant;

use crate::support::{Call, Reply, Service, Settings, command, count, somebody_is_blocked};

fn other_body(service: &Service, key: &str) -> Call {
    service
        .post("/v1/charges", key)
        .json(&json!({"amount": 4999, "currency": "usd", "customer": "cus_ABC123"}))
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn one_key_with_two_bodies_in_parallel_makes_one_charge(pool: PgPool) {
    let one = Service::start(&pool).await;
    let other = one.replica();
    for round in 0..20 {
        let key = format!("order_{round}");
        let replies = join_all((0..32).map(|i| {
            let replica = if i % 4 < 2 { &one } else { &other };
            if i % 2 == 0 {
                replica.charge(&key)
            } else {
                other_body(replica, &key)
            }
            .send()
        }))
        .await;
        let (honoured, refused): (Vec<_>, Vec<_>) =
            replies.iter().partition(|reply| reply.status == 200);
        assert_eq!((honoured.len(), refused.len()), (16, 16));
        assert!(honoured.iter().all(|reply| reply.body == honoured[0].body));
        for reply in refused {
            reply.assert_error(422, "idempotency_key_reused");
        }
        assert_eq!(one.count_charges().await, round + 1);
    }
}

/// Nobody knows which request a key belongs to until its row is committed, so
/// the other request waits for that, and is refused then.
#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn another_body_is_refused_while_the_first_is_in_flight(pool: PgPool) {
    let service = Service::start(&pool).await;
    let mut blocker = pool
        .begin_with("begin; lock table charges in share mode")
        .await
        .unwrap();
    let first = tokio::spawn(service.charge("order_1").send());
    somebody_is_blocked(&pool).await;
    let second = tokio::spawn(other_body(&service, "order_1").send());
    sqlx::query("rollback")
        .execute(&mut *blocker)
        .await
        .unwrap();
    assert_eq!(first.await.unwrap().status, 200);
    second
        .await
        .unwrap()
        .assert_error(422, "idempotency_key_reused");
    assert_eq!(service.count_charges().await, 1);
}

/// A client whose honest retry meets somebody else's misuse of its key on the
/// same replica is judged by the row, and not by the request before it.
#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn an_honest_retry_behind_a_misuse_is_replayed(pool: PgPool) {
    let one = Service::start(&pool).await;
    let first = one.charge("order_1").send().await;
    let other = one.replica();
    let replies = join_all((0..16).map(|i| {
        if i % 2 == 0 {
            other_body(&other, "order_1")
        } else {
            other.charge("order_1")
        }
        .send()
    }))
    .await;
    for (i, reply) in replies.iter().enumerate() {
        if i % 2 == 0 {
            reply.assert_error(422, "idempotency_key_reused");
        } else {
            assert_eq!(reply.body, first.body);
        }
    }
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn another_path_under_the_same_key_is_refused(pool: PgPool) {
    let service = Service::start(&pool).await;
    let submit = async |path: &str| {
        let mut command = command(service.account_id, "order_1");
        command.fingerprint = Fingerprint::new("POST", path, &command.charge.request);
        command.digests = FieldDigests::new("POST", path, &command.charge.request);
        let wait = Duration::from_secs(2);
        let deadline = Instant::now() + Duration::from_secs(10);
        let command = Command::CreateCharge(Box::new(command));
        service.app.writer.submit(command, wait, deadline).await
    };
    let first = submit("/v1/charges").await.unwrap();
    let replay = submit("/v1/charges").await.unwrap();
    assert!(replay.replayed && !first.replayed);
    assert_eq!(replay.answer, first.answer);
    let elsewhere = Some(vec!["path".to_owned()]);
    assert_eq!(submit("/v1/other").await, Err(Error::KeyReused(elsewhere)));
}

/// A row of a newer release can be neither replayed nor refused by this one.
#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn a_fingerprint_of_a_newer_release_is_not_guessed_at(pool: PgPool) {
    let service = Service::start(&pool).await;
    service.charge("order_1").send().await;
    sqlx::query("update idempotency_keys set request_hash = set_byte(request_hash, 0, 3)")
        .execute(&pool)
        .await
        .unwrap();
    service
        .charge("order_1")
        .send()
        .await
        .assert_error(503, "unavailable");
    assert_eq!(service.count_charges().await, 1);
}

type Fields<'a> = &'a [(&'a str, &'a str)];

/// What version 1 hashed, written down by hand: every field, and null for what
/// was left out.
fn version_1(path: &str, fields: Fields) -> (Vec<u8>, Vec<u8>) {
    let canonical: Vec<_> = fields
        .iter()
        .map(|(name, value)| format!("\"{name}\":{value}"))
        .collect();
    let canonical = format!("{{{}}}", canonical.join(","));
    let mut hash = vec![1];
    hash.extend(Sha256::digest(format!("\u{1}POST\n{path}\n{canonical}")));
    let mut digests = vec![1];
    digests.extend(&Sha256::digest(format!("POST\n{path}"))[..4]);
    for (name, value) in fields {
        let mut digest = Sha256::new();
        digest.update((name.len() as u64).to_be_bytes());
        digest.update(format!("{name}{value}"));
        digests.extend(&digest.finalize()[..6]);
    }
    (hash, digests)
}

/// Makes all rows of a table those of the release before. `digests` are of the
/// key's row alone.
async fn age(pool: &PgPool, table: &str, (hash, digests): &(Vec<u8>, Vec<u8>)) {
    let set = format!("update {table} set request_hash = $1");
    sqlx::query(AssertSqlSafe(set))
        .bind(hash)
        .execute(pool)
        .await
        .unwrap();
    sqlx::query("update idempotency_keys set field_digests = $1")
        .bind(digests)
        .execute(pool)
        .await
        .unwrap();
}

async fn expire(pool: &PgPool) {
    let expire = "update idempotency_keys set expires_at = statement_timestamp()";
    sqlx::query(expire).execute(pool).await.unwrap();
    purge::run_until_done(pool).await.unwrap();
    assert_eq!(count(pool, "idempotency_keys").await, 0);
}

fn differing(reply: &Reply) -> serde_json::Value {
    reply.assert_error(422, "idempotency_key_reused").value()["differs"].clone()
}

/// An honest retry that comes after an upgrade is replayed, from the key's row
/// and, years later, from the charge.
#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn a_charge_of_the_release_before_is_compared_by_its_rule(pool: PgPool) {
    let service = Service::start(&pool).await;
    let first = service.charge("order_1").send().await;
    assert_eq!(first.status, 200);
    let rows = version_1(
        "/v1/charges",
        &[
            ("amount", "5000"),
            ("capture", "true"),
            ("currency", "\"usd\""),
            ("customer", "\"cus_ABC123\""),
            ("description", "null"),
            ("metadata", "{}"),
            ("source", "null"),
        ],
    );
    age(&pool, "idempotency_keys", &rows).await;
    age(&pool, "charges", &rows).await;
    for purged in [false, true] {
        if purged {
            expire(&pool).await;
        }
        // Twice: the row that the first retry brings back is of that release too.
        for _ in 0..2 {
            let retry = service.replica().charge("order_1").send().await;
            assert_eq!((&retry.body, retry.is_replayed()), (&first.body, true));
        }
        let other = service
            .post("/v1/charges", "order_1")
            .form("amount=4999&currency=usd&customer=cus_ABC123&capture=false")
            .send()
            .await;
        let differs = if purged {
            serde_json::Value::Null
        } else {
            json!(["amount", "capture"])
        };
        assert_eq!(differing(&other), differs);
        let elsewhere = service
            .post("/v1/refunds", "order_1")
            .form(&format!("charge={}", first.charge_id()))
            .send()
            .await;
        elsewhere.assert_error(422, "idempotency_key_reused");
    }
    assert_eq!(service.count_charges().await, 1);
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn changes_of_the_release_before_are_compared_by_its_rule(pool: PgPool) {
    let service = Service::start(&pool).await;
    let charge = service
        .post("/v1/charges", "charge_1")
        .form("amount=5000&currency=usd&capture=false")
        .send()
        .await
        .charge_id();
    pool.execute("delete from idempotency_keys").await.unwrap();
    let charge_text = format!("\"{charge}\"");
    let cases: [(String, &str, &str, Fields, &str); 3] = [
        (
            format!("/v1/charges/{charge}/capture"),
            "",
            "amount=4000",
            &[("amount", "null")],
            "amount",
        ),
        (
            format!("/v1/charges/{charge}"),
            "description=a teapot",
            "description=a cup",
            &[
                ("clears_metadata", "false"),
                ("description", "\"a teapot\""),
                ("metadata", "{}"),
            ],
            "description",
        ),
        (
            "/v1/refunds".to_owned(),
            &format!("charge={charge}&amount=7"),
            &format!("charge={charge}&amount=7&reason=duplicate"),
            &[
                ("amount", "7"),
                ("charge", &charge_text),
                ("metadata", "{}"),
                ("reason", "null"),
            ],
            "reason",
        ),
    ];
    for (path, body, other, fields, differs) in cases {
        let ask = |body: &str| service.post(&path, "change_1").form(body).send();
        let first = ask(body).await;
        assert_eq!(first.status, 200, "{first:?}");
        let rows = version_1(&path, fields);
        age(&pool, "idempotency_keys", &rows).await;
        let retry = ask(body).await;
        assert_eq!((&retry.body, retry.is_replayed()), (&first.body, true));
        assert_eq!(differing(&ask(other).await), json!([differs]));
        if path == "/v1/refunds" {
            age(&pool, "refunds", &rows).await;
            expire(&pool).await;
            let retry = ask(body).await;
            assert_eq!((&retry.body, retry.is_replayed()), (&first.body, true));
            differing(&ask(other).await);
        }
        pool.execute("delete from idempotency_keys").await.unwrap();
    }
    assert_eq!(count(&pool, "refunds").await, 1);
}

/// Keys that are made of a request stay what they are over an upgrade: else the
/// same would be done twice within the time that they are kept.
#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn made_keys_are_those_of_the_release_before(pool: PgPool) {
    let settings = Settings {
        keyless: Keyless::Fingerprint,
        duplicate_guard: DuplicateGuard::Refuse,
        ..Settings::default()
    };
    let service = Service::start_with(&pool, settings).await;
    let body = json!({"amount": 5000, "currency": "usd", "customer": "cus_1"});
    let charged = service.call("POST", "/v1/charges").json(&body).send().await;
    assert_eq!(charged.status, 200);
    let (request, _) = version_1(
        "/v1/charges",
        &[
            ("amount", "5000"),
            ("capture", "true"),
            ("currency", "\"usd\""),
            ("customer", "\"cus_1\""),
            ("description", "null"),
            ("metadata", "{}"),
            ("source", "null"),
        ],
    );
    let mut guard = vec![1];
    guard.extend(Sha256::digest("\u{1}\n\n[\"cus_1\",5000,\"usd\"]"));
    let hex = |bytes: &[u8]| {
        bytes.iter().fold(String::new(), |mut text, byte| {
            write!(text, "{byte:02x}").unwrap();
            text
        })
    };
    let expected = [
        format!("guard {}", hex(&guard)),
        format!("keyless {}", hex(&request)),
    ];
    let keys: Vec<String> = sqlx::query_scalar("select key from idempotency_keys order by key")
        .fetch_all(&pool)
        .await
        .unwrap();
    assert_eq!(keys, expected);
}
