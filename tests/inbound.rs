//! What comes in from elsewhere is accepted once.

use std::time::Duration;

use payonce::{
    idempotency::{
        Key, Rules,
        inbound::{Accepted, Identity, accept},
    },
    ids::AccountId,
};
use sqlx::{PgConnection, PgPool};

use crate::support::count;

async fn accept_one(
    conn: &mut PgConnection,
    account_id: AccountId,
    message: Identity<'_>,
) -> Accepted {
    accept(conn, account_id, &[message], &Rules::default())
        .await
        .unwrap()[0]
}

/// Each way of telling one message from another, a duplicate, and one that
/// differs.
fn identities<'a>(
    email: &'a Key,
    other_email: &'a Key,
) -> Vec<(Identity<'a>, Identity<'a>, Duration)> {
    use Identity::{Body, DeduplicationId, Email, Event, Message};
    let day = Duration::from_hours(24);
    vec![
        (Event("stripe", "evt_1"), Event("adyen", "evt_1"), 7 * day),
        (Event("ab", "c"), Event("a", "bc"), 7 * day),
        (Message("orders", "1"), Message("orders", "2"), day),
        (Email(email), Email(other_email), day),
        (
            DeduplicationId("orders", "1"),
            DeduplicationId("invoices", "1"),
            Duration::from_mins(5),
        ),
        (
            Body("orders", b"{\"order\":1}"),
            Body("orders", b"{\"order\": 1}"),
            Duration::from_mins(5),
        ),
    ]
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn a_duplicate_is_accepted_and_not_done_again(pool: PgPool) {
    let mut conn = pool.acquire().await.unwrap();
    let account_id = AccountId::new();
    let key = |text: &str| Key::from_header(text.as_bytes()).unwrap();
    let (email, other_email) = (key("welcome:1"), key("welcome:2"));
    for (message, other, keep) in identities(&email, &other_email) {
        assert_eq!(
            accept_one(&mut conn, account_id, message).await,
            Accepted::New
        );
        assert_eq!(
            accept_one(&mut conn, account_id, message).await,
            Accepted::Duplicate
        );
        let kept: f64 = sqlx::query_scalar(
            "select extract(epoch from expires_at - created_at)::float8 from idempotency_keys",
        )
        .fetch_one(&pool)
        .await
        .unwrap();
        assert!(
            (kept - keep.as_secs_f64()).abs() < 0.001,
            "{message:?}: {kept} s"
        );
        assert_eq!(
            accept_one(&mut conn, account_id, other).await,
            Accepted::New,
            "{other:?}"
        );
        let elsewhere = AccountId::new();
        assert_eq!(
            accept_one(&mut conn, elsewhere, message).await,
            Accepted::New
        );

        // Its time is over.
        sqlx::query("update idempotency_keys set expires_at = statement_timestamp()")
            .execute(&pool)
            .await
            .unwrap();
        assert_eq!(
            accept_one(&mut conn, account_id, message).await,
            Accepted::New
        );
        sqlx::query("delete from idempotency_keys")
            .execute(&pool)
            .await
            .unwrap();
    }
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn a_slice_may_hold_a_message_twice(pool: PgPool) {
    let mut conn = pool.acquire().await.unwrap();
    let messages = [
        Identity::Message("orders", "1"),
        Identity::Message("orders", "2"),
        Identity::Message("orders", "1"),
    ];
    let account_id = AccountId::new();
    let expected = [Accepted::New, Accepted::New, Accepted::Duplicate];
    let rules = Rules::default();
    for _ in 0..2 {
        let accepted = accept(&mut conn, account_id, &messages, &rules)
            .await
            .unwrap();
        assert_eq!(accepted, expected);
        // The same when all of them are there already and have expired.
        sqlx::query("update idempotency_keys set expires_at = statement_timestamp()")
            .execute(&pool)
            .await
            .unwrap();
    }
    assert_eq!(
        accept(&mut conn, account_id, &[], &rules).await.unwrap(),
        []
    );
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn what_rolls_back_was_not_accepted(pool: PgPool) {
    let account_id = AccountId::new();
    let message = Identity::Event("stripe", "evt_1");
    let mut dies = pool.begin_with("begin").await.unwrap();
    assert_eq!(
        accept_one(&mut dies, account_id, message).await,
        Accepted::New
    );
    let mut other = pool.begin_with("begin").await.unwrap();
    assert_eq!(
        accept_one(&mut other, account_id, message).await,
        Accepted::InUse,
        "it neither waits nor is done twice"
    );
    dies.rollback().await.unwrap();
    assert_eq!(
        accept_one(&mut other, account_id, message).await,
        Accepted::New
    );
    other.commit().await.unwrap();
    assert_eq!(count(&pool, "idempotency_keys").await, 1);
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn a_rule_can_say_that_duplicates_are_refused(pool: PgPool) {
    let mut conn = pool.acquire().await.unwrap();
    let rules = Rules::with(&["webhook=1d,refuse".parse().unwrap()]).unwrap();
    let account_id = AccountId::new();
    let message = [Identity::Event("stripe", "evt_1")];
    for expected in [Accepted::New, Accepted::Refused] {
        let accepted = accept(&mut conn, account_id, &message, &rules)
            .await
            .unwrap();
        assert_eq!(accepted, [expected]);
    }
}
