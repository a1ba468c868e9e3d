//! The duplicate guard: a client that mints a new key for each retry.

use std::{collections::HashSet, time::Duration};

use futures::future::join_all;
use payonce::http::DuplicateGuard;
use serde_json::{Value, json};
use sqlx::PgPool;

use crate::support::{Call, Service, Settings, count, proxy::Proxy};

async fn guarded(pool: &PgPool, duplicate_guard: DuplicateGuard) -> Service {
    let settings = Settings {
        duplicate_guard,
        ..Settings::default()
    };
    Service::start_with(pool, settings).await
}

fn charge(service: &Service, key: &str, differs: &Value) -> Call {
    let mut body = json!({"amount": 5000, "currency": "usd", "customer": "cus_ABC123"});
    for (name, value) in differs.as_object().unwrap() {
        body[name] = value.clone();
    }
    service.post("/v1/charges", key).json(&body)
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn off_lets_everything_through(pool: PgPool) {
    let service = guarded(&pool, DuplicateGuard::Off).await;
    for key in ["try_1", "try_2"] {
        let reply = service.charge(key).send().await;
        assert_eq!(reply.status, 200);
        assert!(!reply.headers.contains_key("payonce-duplicate-of"));
    }
    assert_eq!(count(&pool, "idempotency_keys").await, 2);
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn warn_lets_through_and_names_the_other(pool: PgPool) {
    let service = guarded(&pool, DuplicateGuard::Warn).await;
    let first = service.charge("try_1").send().await;
    assert!(!first.headers.contains_key("payonce-duplicate-of"));
    for key in ["try_2", "try_3"] {
        let second = service.charge(key).send().await;
        assert_eq!(second.status, 200);
        assert_eq!(second.headers["payonce-duplicate-of"], first.charge_id());
    }
    assert_eq!(service.count_charges().await, 3);
}

/// Whoever lost the first answer is told with the second one.
#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn a_replay_names_the_other_too(pool: PgPool) {
    let service = guarded(&pool, DuplicateGuard::Warn).await;
    let first = service.charge("try_1").send().await;
    let second = service.charge("try_2").send().await;
    // The replica does not even guard.
    let unguarded = service.replica_with(Settings::default());
    for replica in [&service, &service.replica(), &unguarded] {
        let replay = replica.charge("try_2").send().await;
        assert!(replay.is_replayed());
        assert_eq!((replay.status, &replay.body), (second.status, &second.body));
        assert_eq!(replay.headers["payonce-duplicate-of"], first.charge_id());
        let replay = replica.charge("try_1").send().await;
        assert!(replay.is_replayed());
        assert!(!replay.headers.contains_key("payonce-duplicate-of"));
    }
    // What stands in the row belongs to the charge, and to no other request.
    let other = charge(&service, "try_2", &json!({"amount": 1}));
    let other = other.send().await;
    other.assert_error(422, "idempotency_key_reused");
    assert!(!other.headers.contains_key("payonce-duplicate-of"));
}

/// Whether the lost COMMIT was carried out or not: the first answer and its replay
/// name the other.
#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn a_lost_commit_loses_no_warning(pool: PgPool) {
    let proxy = Proxy::to(&pool).await;
    let service = guarded(&pool, DuplicateGuard::Warn).await;
    let first = service.charge("try_1").send().await.charge_id();
    let behind = service.behind(&proxy);
    for committed in [true, false] {
        proxy.lose_commits(1, committed);
        let key = format!("lost_{committed}");
        for replica in [&behind, &service] {
            let reply = replica.charge(&key).send().await;
            assert_eq!(reply.status, 200, "{reply:?}");
            assert_eq!(reply.headers["payonce-duplicate-of"], first);
        }
        assert_eq!(proxy.commits_to_lose(), 0);
    }
    assert_eq!(service.count_charges().await, 3);
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn refuse_makes_one_charge_of_sixteen_under_new_keys(pool: PgPool) {
    let one = guarded(&pool, DuplicateGuard::Refuse).await;
    let other = one.replica();
    let replies = join_all((0..16).map(|i| {
        if i % 2 == 0 { &one } else { &other }
            .charge(&format!("try_{i}"))
            .send()
    }))
    .await;
    let (made, refused): (Vec<_>, Vec<_>) = replies.iter().partition(|reply| reply.status == 200);
    assert_eq!((made.len(), refused.len()), (1, 15));
    for reply in refused {
        reply.assert_error(409, "duplicate_charge");
        assert_eq!(reply.headers["stripe-should-retry"], "false");
        assert!(!reply.headers.contains_key("retry-after"));
        assert_eq!(reply.value()["error"]["charge"], made[0].charge_id());
    }
    assert_eq!(one.count_charges().await, 1);
    // The refused ones left nothing: the charge's key, and the guard's.
    assert_eq!(count(&pool, "idempotency_keys").await, 2);
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn a_retry_under_the_first_key_is_a_replay(pool: PgPool) {
    let service = guarded(&pool, DuplicateGuard::Refuse).await;
    let first = service.charge("try_1").send().await;
    let retry = service.charge("try_1").send().await;
    assert_eq!(retry.body, first.body);
    assert!(retry.is_replayed());
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn what_differs_is_no_duplicate(pool: PgPool) {
    let service = guarded(&pool, DuplicateGuard::Refuse).await;
    assert_eq!(service.charge("try_1").send().await.status, 200);
    for (i, differs) in [
        json!({"amount": 5001}),
        json!({"currency": "eur"}),
        json!({"customer": "cus_XYZ"}),
    ]
    .iter()
    .enumerate()
    {
        let key = format!("other_{i}");
        assert_eq!(charge(&service, &key, differs).send().await.status, 200);
    }
    let other_account = service.other_account().await;
    assert_eq!(other_account.charge("try_1").send().await.status, 200);
    // What is no part of it makes no difference.
    charge(&service, "try_2", &json!({"description": "again"}))
        .send()
        .await
        .assert_error(409, "duplicate_charge");
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn a_decline_and_a_charge_of_nobody_do_not_arm_it(pool: PgPool) {
    let service = guarded(&pool, DuplicateGuard::Refuse).await;
    let declined = charge(&service, "try_1", &json!({"source": "tok_chargeDeclined"}));
    declined.send().await.assert_error(402, "card_declined");
    assert_eq!(service.charge("try_2").send().await.status, 200);
    for key in ["anonymous_1", "anonymous_2"] {
        let reply = charge(&service, key, &json!({"customer": null}))
            .send()
            .await;
        assert_eq!(reply.status, 200);
    }
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn a_request_that_means_it_goes_through(pool: PgPool) {
    let service = guarded(&pool, DuplicateGuard::Refuse).await;
    let means_it = |key: &str| {
        service
            .charge(key)
            .header("payonce-allow-duplicate", "true")
            .send()
    };
    let first = means_it("try_1").await;
    assert_eq!(first.status, 200);
    let second = means_it("try_2").await;
    assert_eq!(second.status, 200);
    assert!(!second.is_replayed());
    // The header is no part of what is asked for.
    let retry = service.charge("try_2").send().await;
    assert_eq!(retry.body, second.body);
    // It arms the guard like any other.
    service
        .charge("try_3")
        .send()
        .await
        .assert_error(409, "duplicate_charge");
    for nonsense in ["yes", "TRUE", ""] {
        let reply = service
            .charge("try_4")
            .header("payonce-allow-duplicate", nonsense)
            .send()
            .await;
        reply.assert_error(400, "parameter_invalid");
        assert_eq!(reply.value()["error"]["param"], "Payonce-Allow-Duplicate");
    }
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn after_the_window_it_is_a_new_operation(pool: PgPool) {
    let service = guarded(&pool, DuplicateGuard::Refuse).await;
    service.charge("try_1").send().await;
    let window: f64 = sqlx::query_scalar(
        "select extract(epoch from expires_at - created_at)::float8 from idempotency_keys
         where key like 'guard %'",
    )
    .fetch_one(&pool)
    .await
    .unwrap();
    assert!((window - 300.0).abs() < 0.001, "{window} s");
    sqlx::query("update idempotency_keys set expires_at = now() where key like 'guard %'")
        .execute(&pool)
        .await
        .unwrap();
    let replies = join_all((2..10).map(|i| service.charge(&format!("try_{i}")).send())).await;
    let made: HashSet<_> = replies
        .iter()
        .filter(|reply| reply.status == 200)
        .map(|reply| reply.body.clone())
        .collect();
    assert_eq!(made.len(), 1, "the guard was taken over by one");
    assert_eq!(service.count_charges().await, 2);
}

/// Refused means that nothing is stored: once the window is over the same key is
/// charged.
#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn a_refused_key_works_later(pool: PgPool) {
    let service = guarded(&pool, DuplicateGuard::Refuse).await;
    service.charge("try_1").send().await;
    service
        .charge("try_2")
        .send()
        .await
        .assert_error(409, "duplicate_charge");
    sqlx::query("delete from idempotency_keys where key like 'guard %'")
        .execute(&pool)
        .await
        .unwrap();
    let later = service.charge("try_2").send().await;
    assert_eq!(later.status, 200);
    assert!(!later.is_replayed());
}

/// Another replica's charge that is not committed yet is waited for, and what
/// comes of it decides.
#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn a_guard_that_is_in_flight_is_waited_for(pool: PgPool) {
    let service = guarded(&pool, DuplicateGuard::Refuse).await;
    service.charge("try_1").send().await;
    for (rolls_back, status) in [(true, 200), (false, 409)] {
        sqlx::query("update idempotency_keys set expires_at = now() where key like 'guard %'")
            .execute(&pool)
            .await
            .unwrap();
        // What another replica's transaction does with the guard.
        let mut holder = pool.begin_with("begin").await.unwrap();
        sqlx::query(
            "select pg_advisory_xact_lock(hashtextextended(key, uuid_hash_extended(account_id, 0)))
             from idempotency_keys where key like 'guard %'",
        )
        .execute(&mut *holder)
        .await
        .unwrap();
        sqlx::query(
            "update idempotency_keys set expires_at = now() + interval '1 minute'
             where key like 'guard %'",
        )
        .execute(&mut *holder)
        .await
        .unwrap();
        let request = tokio::spawn(service.charge(&format!("{rolls_back}")).send());
        // Long enough for it to meet the guard.
        tokio::time::sleep(Duration::from_millis(300)).await;
        assert!(!request.is_finished());
        assert_eq!(
            service.count_charges().await,
            1,
            "nothing is made meanwhile"
        );
        if rolls_back {
            holder.rollback().await.unwrap();
        } else {
            holder.commit().await.unwrap();
        }
        assert_eq!(request.await.unwrap().status, status);
        sqlx::query("delete from charges where idempotency_key = 'true'")
            .execute(&pool)
            .await
            .unwrap();
    }
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn a_lost_commit_is_no_duplicate_of_itself(pool: PgPool) {
    let proxy = Proxy::to(&pool).await;
    let service = guarded(&pool, DuplicateGuard::Refuse).await.behind(&proxy);
    for (i, committed) in [true, false, true].into_iter().enumerate() {
        proxy.lose_commits(1, committed);
        let customer = json!({"customer": format!("cus_{i}")});
        let reply = charge(&service, &format!("try_{i}"), &customer)
            .send()
            .await;
        assert_eq!(reply.status, 200, "{reply:?}");
        assert_eq!(proxy.commits_to_lose(), 0);
    }
    assert_eq!(service.count_charges().await, 3);
}
