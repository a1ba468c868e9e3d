//! The SQL of `idempotency_keys`, but for the claim of a charge's key, which is
//! written together with the charge (`charges::claim_and_insert`), and for the
//! purge.
//!
//! Every function takes slices and sends one statement for all, on the caller's
//! transaction. None of the statements can be planned as a scan of the table:
//! they find rows by `lateral … limit 1`, by `ctid`, or by the unique index of
//! `on conflict`.

use std::time::Duration;

use chrono::{DateTime, Utc};
use sqlx::{PgConnection, PgPool, types::Uuid};

use super::{Answer, Fingerprint, Scope, held::HeldKeys};
use crate::{
    db::{
        corrupt_column, position,
        replication::{Standbys, WrittenBy},
    },
    ids::RequestId,
};

/// A row as it is written.
#[derive(Debug, Clone, Copy)]
pub struct NewRow<'a> {
    /// Whose key, and which.
    pub scope: &'a Scope,
    /// Of the request that the key belongs to.
    pub fingerprint: Fingerprint,
    /// Of its fields; `None` where they are not known.
    pub digests: Option<&'a [u8]>,
    /// What the key is claimed for; the claim is found again by it.
    pub operation_id: Uuid,
    /// The request in which it is claimed.
    pub request_id: RequestId,
    /// `None`: the work is still to be done, and the row is its lock.
    pub answer: Option<&'a Answer>,
    /// How long the answer is kept, from this statement on.
    pub keep: Duration,
}

/// What a key's row says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyRow {
    /// Of the request that the key belongs to.
    pub fingerprint: Fingerprint,
    /// Of the fields of that request, where they are known.
    pub digests: Option<Vec<u8>>,
    /// What the key was claimed for.
    pub operation_id: Uuid,
    /// The request in which it was claimed.
    pub request_id: RequestId,
    /// `None` while the work is under way.
    pub answer: Option<Answer>,
    /// The answer is there, and past its time.
    pub expired: bool,
    /// Who wrote the row, where there are synchronous standbys: what is answered from
    /// it needs a record of its own, see [`replication`](crate::db::replication).
    pub written_by: Option<WrittenBy>,
}

/// Claims keys: inserts their rows where there are none. For each says whether
/// it did; `false` where a row is there, or where another transaction is at it.
///
/// The same key may stand among them twice: the first gets it.
///
/// # Errors
/// Any database error.
pub async fn claim(conn: &mut PgConnection, rows: &[NewRow<'_>]) -> Result<Vec<bool>, sqlx::Error> {
    let columns = Columns::of(rows);
    // The try-lock keeps the batch from waiting for a key that another
    // transaction holds; it decides nothing, the row does. Rows go in ordered, so
    // that two batches cannot wait for each other in a circle.
    let claimed = sqlx::query_scalar!(
        r#"
        insert into idempotency_keys (
            account_id, key, request_hash, operation_id, request_id,
            response_status, response_head, response_body, created_at, expires_at, field_digests
        )
        select
            account_id, key, request_hash, operation_id, request_id,
            response_status, response_head::json, response_body::json,
            statement_timestamp(), statement_timestamp() + make_interval(secs => keep), field_digests
        from unnest(
            $1::uuid[], $2::text[], $3::bytea[], $4::uuid[], $5::uuid[],
            $6::int2[], $7::text[], $8::text[], $9::float8[], $10::bytea[]
        ) as input (
            account_id, key, request_hash, operation_id, request_id,
            response_status, response_head, response_body, keep, field_digests
        )
        where pg_try_advisory_xact_lock(hashtextextended(key, uuid_hash_extended(account_id, 0)))
        order by account_id, key collate "C"
        on conflict do nothing
        returning operation_id
        "#,
        &columns.account_ids,
        &columns.keys as &[&str],
        &columns.fingerprints as &[&[u8]],
        &columns.operation_ids,
        &columns.request_ids,
        &columns.statuses as &[Option<i16>],
        &columns.heads as &[Option<&str>],
        &columns.bodies as &[Option<&str>],
        &columns.keep,
        &columns.digests as &[Option<&[u8]>],
    )
    .fetch_all(conn)
    .await?;
    Ok(rows
        .iter()
        .map(|row| claimed.contains(&row.operation_id))
        .collect())
}

/// Reads the rows of these keys as they are now; `None` where none can be seen.
///
/// # Errors
/// Any database error.
pub async fn read(
    conn: &mut PgConnection,
    scopes: &[&Scope],
) -> Result<Vec<Option<KeyRow>>, sqlx::Error> {
    // statement_timestamp(): now() is when the transaction began, and is stale
    // after a wait.
    let found = sqlx::query!(
        r#"
        select input.position as "position!", row.request_hash, row.operation_id,
            row.request_id, row.field_digests, row.response_status, row.response_head::text, row.response_body::text,
            row.response_status is not null and row.expires_at <= statement_timestamp() as "expired!",
            case when current_setting('synchronous_standby_names') <> '' then row.writer::text::int8 end as written_by,
            (select pg_snapshot_xmin(pg_current_snapshot())::text::int8) as "horizon!",
            (select pg_snapshot_xmax(pg_current_snapshot())::text::int8) as "snapshot_end!",
            (select pg_postmaster_start_time()::text || ' ' || current_setting('synchronous_standby_names')) as "standbys!"
        from unnest($1::uuid[], $2::text[]) with ordinality as input (account_id, key, position)
        cross join lateral (
            select *, xmin as writer from idempotency_keys
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
                head: row.response_head.map(Into::into),
                body: body.into(),
            }),
            _ => None,
        };
        rows[position(row.position)] = Some(KeyRow {
            fingerprint: Fingerprint::from_column(&row.request_hash)
                .ok_or_else(|| corrupt_column("request_hash"))?,
            digests: row.field_digests,
            operation_id: row.operation_id,
            request_id: RequestId(row.request_id),
            answer,
            expired: row.expired,
            written_by: row.written_by.map(|xmin| {
                let xid = u32::try_from(xmin).unwrap_or_default();
                WrittenBy::of(
                    xid,
                    row.horizon.cast_unsigned(),
                    row.snapshot_end.cast_unsigned(),
                    Standbys(row.standbys),
                )
            }),
        });
    }
    Ok(rows)
}

/// What is known of a key by its row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum History {
    /// It was claimed, and answered.
    Answered {
        /// When it was claimed.
        created: DateTime<Utc>,
        /// With which status, and until when the answer is kept; `None` if that
        /// time is over.
        answered: Option<(u16, DateTime<Utc>)>,
    },
    /// Somebody is at it now.
    InUse,
    /// It has no row.
    Unknown,
}

/// What is known of a key.
///
/// # Errors
/// Any database error.
pub async fn history(
    pool: &PgPool,
    held_keys: &HeldKeys,
    scope: &Scope,
) -> Result<History, sqlx::Error> {
    if let Some(history) = history_of_row(pool, scope).await? {
        return Ok(history);
    }
    // Whoever claims a key holds its lock until its row can be seen: so if the
    // lock is free, and there is no row after that, there was none.
    if held_keys.holds(pool, scope).await? {
        return Ok(History::InUse);
    }
    Ok(history_of_row(pool, scope)
        .await?
        .unwrap_or(History::Unknown))
}

async fn history_of_row(pool: &PgPool, scope: &Scope) -> Result<Option<History>, sqlx::Error> {
    let row = sqlx::query!(
        r#"
            select response_status, created_at, expires_at,
                expires_at <= statement_timestamp() as "expired!"
            from idempotency_keys
            where account_id = $1 and key = $2
            "#,
        scope.account_id.0,
        scope.key.as_str(),
    )
    .fetch_optional(pool)
    .await?;
    Ok(row.map(|row| match row.response_status {
        None => History::InUse,
        Some(status) => History::Answered {
            created: row.created_at,
            answered: (!row.expired).then_some((status.cast_unsigned(), row.expires_at)),
        },
    }))
}

/// Frees the keys whose answers have expired, so that they can be claimed anew
/// in the same transaction. For each says whether it did: a row that another
/// transaction is at, or that was claimed anew meanwhile, stays.
///
/// # Errors
/// Any database error.
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

/// Writes the answers of keys that this transaction has claimed, and whatever
/// else the rows say now.
///
/// # Errors
/// Any database error; [`sqlx::Error::RowNotFound`] if a row is not there any
/// more, and nothing of the transaction may be kept then.
pub async fn answer(conn: &mut PgConnection, rows: &[NewRow<'_>]) -> Result<(), sqlx::Error> {
    let columns = Columns::of(rows);
    // An upsert, since that cannot be planned as a scan, of rows that are there.
    let written = sqlx::query!(
        r#"
        insert into idempotency_keys as existing (
            account_id, key, request_hash, operation_id, request_id,
            response_status, response_head, response_body, created_at, expires_at, field_digests
        )
        select
            account_id, key, request_hash, operation_id, request_id,
            response_status, response_head::json, response_body::json,
            statement_timestamp(), statement_timestamp() + make_interval(secs => keep), field_digests
        from unnest(
            $1::uuid[], $2::text[], $3::bytea[], $4::uuid[], $5::uuid[],
            $6::int2[], $7::text[], $8::text[], $9::float8[], $10::bytea[]
        ) as input (
            account_id, key, request_hash, operation_id, request_id,
            response_status, response_head, response_body, keep, field_digests
        )
        cross join lateral (
            select from idempotency_keys as there
            where there.account_id = input.account_id
              and there.key = input.key collate "C"
            limit 1
        ) as there
        order by account_id, key collate "C"
        on conflict (account_id, key) do update set
            request_hash = excluded.request_hash,
            operation_id = excluded.operation_id,
            request_id = excluded.request_id,
            response_status = excluded.response_status,
            response_head = excluded.response_head,
            response_body = excluded.response_body,
            expires_at = excluded.expires_at,
            field_digests = excluded.field_digests
        "#,
        &columns.account_ids,
        &columns.keys as &[&str],
        &columns.fingerprints as &[&[u8]],
        &columns.operation_ids,
        &columns.request_ids,
        &columns.statuses as &[Option<i16>],
        &columns.heads as &[Option<&str>],
        &columns.bodies as &[Option<&str>],
        &columns.keep,
        &columns.digests as &[Option<&[u8]>],
    )
    .execute(conn)
    .await?;
    if usize::try_from(written.rows_affected()) != Ok(rows.len()) {
        return Err(sqlx::Error::RowNotFound);
    }
    Ok(())
}

/// Gives keys up that this transaction has claimed: as if it never had.
///
/// # Errors
/// Any database error.
pub async fn release(conn: &mut PgConnection, scopes: &[&Scope]) -> Result<(), sqlx::Error> {
    sqlx::query!(
        r#"
        delete from idempotency_keys
        where ctid = any (array(
            select row.id
            from unnest($1::uuid[], $2::text[]) as input (account_id, key)
            cross join lateral (
                select idempotency_keys.ctid as id from idempotency_keys
                where idempotency_keys.account_id = input.account_id
                  and idempotency_keys.key = input.key collate "C"
                limit 1
            ) as row
        ))
        "#,
        &account_ids(scopes),
        &keys(scopes) as &[&str],
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// Rows as the arrays that a statement takes.
struct Columns<'a> {
    account_ids: Vec<Uuid>,
    keys: Vec<&'a str>,
    fingerprints: Vec<&'a [u8]>,
    operation_ids: Vec<Uuid>,
    request_ids: Vec<Uuid>,
    statuses: Vec<Option<i16>>,
    heads: Vec<Option<&'a str>>,
    bodies: Vec<Option<&'a str>>,
    keep: Vec<f64>,
    digests: Vec<Option<&'a [u8]>>,
}

impl<'a> Columns<'a> {
    fn of(rows: &'a [NewRow<'a>]) -> Self {
        let answers = || rows.iter().map(|row| row.answer);
        Self {
            account_ids: rows.iter().map(|row| row.scope.account_id.0).collect(),
            keys: rows.iter().map(|row| row.scope.key.as_str()).collect(),
            fingerprints: rows.iter().map(|row| row.fingerprint.as_bytes()).collect(),
            operation_ids: rows.iter().map(|row| row.operation_id).collect(),
            request_ids: rows.iter().map(|row| row.request_id.0).collect(),
            statuses: answers().map(|a| Some(a?.status.cast_signed())).collect(),
            heads: answers().map(|a| a?.head.as_deref()).collect(),
            bodies: answers().map(|a| Some(&*a?.body)).collect(),
            keep: rows.iter().map(|row| row.keep.as_secs_f64()).collect(),
            digests: rows.iter().map(|row| row.digests).collect(),
        }
    }
}

fn account_ids(scopes: &[&Scope]) -> Vec<Uuid> {
    scopes.iter().map(|scope| scope.account_id.0).collect()
}

fn keys<'a>(scopes: &[&'a Scope]) -> Vec<&'a str> {
    scopes.iter().map(|scope| scope.key.as_str()).collect()
}
