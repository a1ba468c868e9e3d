//! The SQL of `idempotency_keys`, but for the claim, which is written together
//! with the charge (`charges::claim_and_insert`) and for the purge.
//!
//! Every function takes slices and sends one statement for all, on the caller's
//! transaction. None of the statements can be planned as a scan of the table:
//! they find rows by `lateral … limit 1`, by `ctid`, or by the unique index of
//! `on conflict`.

use sqlx::PgConnection;

use super::{Answer, Fingerprint, Scope};
use crate::{
    db::{position, unreadable},
    ids::ChargeId,
};

/// What a key's row says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyRow {
    /// Of the request that the key belongs to.
    pub fingerprint: Fingerprint,
    /// The charge that the key belongs to.
    pub charge_id: ChargeId,
    /// `None` while the work is under way.
    pub answer: Option<Answer>,
    /// The answer is there, and past its time.
    pub expired: bool,
}

/// Reads the rows of these keys as they are now; `None` where none can be seen.
///
/// # Errors
/// What the database said.
pub async fn read(
    conn: &mut PgConnection,
    scopes: &[&Scope],
) -> Result<Vec<Option<KeyRow>>, sqlx::Error> {
    // statement_timestamp(): now() is when the transaction began, and is stale
    // after a wait.
    let found = sqlx::query!(
        r#"
        select input.position as "position!", row.request_hash, row.charge_id,
            row.response_status, row.response_body::text,
            row.response_status is not null and row.expires_at <= statement_timestamp() as "expired!"
        from unnest($1::uuid[], $2::text[]) with ordinality as input (account_id, key, position)
        cross join lateral (
            select * from idempotency_keys
            where idempotency_keys.account_id = input.account_id
              and idempotency_keys.key = input.key collate "C"
            limit 1
        ) as row
        "#,
        &account_ids(scopes),
        &keys(scopes) as &[&str],
    )
    .fetch_all(conn)
    .await?;
    let mut rows = vec![None; scopes.len()];
    for row in found {
        let answer = match (row.response_status, row.response_body) {
            (Some(status), Some(body)) => Some(Answer {
                status: status.cast_unsigned(),
                body: body.into(),
            }),
            _ => None,
        };
        rows[position(row.position)] = Some(KeyRow {
            fingerprint: Fingerprint::from_column(&row.request_hash)
                .ok_or_else(|| unreadable("request_hash"))?,
            charge_id: ChargeId(row.charge_id),
            answer,
            expired: row.expired,
        });
    }
    Ok(rows)
}

/// Frees the keys whose answers have expired, so that they can be claimed anew
/// in the same transaction. For each says whether it did: a row that another
/// transaction is at, or that was claimed anew meanwhile, stays.
///
/// # Errors
/// What the database said.
pub async fn free_expired(
    conn: &mut PgConnection,
    scopes: &[&Scope],
) -> Result<Vec<bool>, sqlx::Error> {
    let found = sqlx::query_scalar!(
        r#"
        with expired as materialized (
            select input.position, row.ctid as id
            from unnest($1::uuid[], $2::text[]) with ordinality as input (account_id, key, position)
            cross join lateral (
                select idempotency_keys.ctid from idempotency_keys
                where idempotency_keys.account_id = input.account_id
                  and idempotency_keys.key = input.key collate "C"
                  and idempotency_keys.expires_at <= statement_timestamp()
                  and idempotency_keys.response_status is not null
                limit 1
                for update skip locked
            ) as row
        ),
        freed as (
            delete from idempotency_keys
            where ctid = any (array(select id from expired))
            returning ctid as id
        )
        select expired.position as "position!"
        from expired
        join freed using (id)
        "#,
        &account_ids(scopes),
        &keys(scopes) as &[&str],
    )
    .fetch_all(conn)
    .await?;
    let mut freed = vec![false; scopes.len()];
    for ordinality in found {
        freed[position(ordinality)] = true;
    }
    Ok(freed)
}

/// Replaces what the rows of these keys say. For rows that this transaction
/// claimed, and that turned out to belong to a charge that was there before.
///
/// # Errors
/// What the database said.
pub async fn replace(
    conn: &mut PgConnection,
    rows: &[(&Scope, Fingerprint, ChargeId, &Answer)],
    answer_ttl_seconds: f64,
) -> Result<(), sqlx::Error> {
    let scopes: Vec<_> = rows.iter().map(|row| row.0).collect();
    sqlx::query!(
        r#"
        insert into idempotency_keys as existing (
            account_id, key, request_hash, charge_id, response_status, response_body,
            created_at, expires_at
        )
        select
            account_id, key, request_hash, charge_id, response_status, response_body::json,
            statement_timestamp(), statement_timestamp() + make_interval(secs => $7)
        from unnest($1::uuid[], $2::text[], $3::bytea[], $4::uuid[], $5::int2[], $6::text[])
            as input (account_id, key, request_hash, charge_id, response_status, response_body)
        order by account_id, key collate "C"
        on conflict (account_id, key) do update set
            request_hash = excluded.request_hash,
            charge_id = excluded.charge_id,
            response_status = excluded.response_status,
            response_body = excluded.response_body
        "#,
        &account_ids(&scopes),
        &keys(&scopes) as &[&str],
        &rows.iter().map(|row| row.1.as_bytes()).collect::<Vec<_>>() as &[&[u8]],
        &rows.iter().map(|row| row.2.0).collect::<Vec<_>>(),
        &rows
            .iter()
            .map(|row| row.3.status.cast_signed())
            .collect::<Vec<_>>(),
        &rows.iter().map(|row| &*row.3.body).collect::<Vec<_>>() as &[&str],
        answer_ttl_seconds,
    )
    .execute(conn)
    .await?;
    Ok(())
}

fn account_ids(scopes: &[&Scope]) -> Vec<sqlx::types::Uuid> {
    scopes.iter().map(|scope| scope.account_id.0).collect()
}

fn keys<'a>(scopes: &[&'a Scope]) -> Vec<&'a str> {
    scopes.iter().map(|scope| scope.key.as_str()).collect()
}
