//! Refunds: what is asked for, and the SQL of its table. What a charge allows
//! is decided by the charge (`Charge::refund`), which is locked meanwhile.

use std::collections::BTreeMap;

use serde::Serialize;
use sqlx::{FromRow, PgConnection, PgExecutor, types::Json};
use utoipa::ToSchema;
use uuid::Uuid;

use crate::{
    charges::metadata_text,
    db::{corrupt_column, position},
    idempotency::{Answer, Blank, Fingerprint, Fingerprinted, Scope},
    ids::{AccountId, ChargeId, RefundId, RequestId},
    money::{Amount, Currency},
    pagination::Page,
};

/// What a client asks for, checked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RefundRequest {
    /// Of which charge.
    pub charge: ChargeId,
    /// How much; all that is left, if it is not said.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub amount: Option<Amount>,
    /// Why.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<Reason>,
    /// For the merchant's programs.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    #[schema(required = false)]
    pub metadata: BTreeMap<String, String>,
}

impl Fingerprinted for RefundRequest {
    const OPTIONAL: &'static [(&'static str, Option<Blank>)] = &[
        ("amount", Some(Blank::Null)),
        ("reason", Some(Blank::Null)),
        ("metadata", Some(Blank::EmptyObject)),
    ];
}

/// Why money is given back: Stripe's reasons.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// It was charged twice.
    Duplicate,
    /// It was not the card's owner.
    Fraudulent,
    /// The customer asked for it.
    RequestedByCustomer,
}

impl Reason {
    /// By its name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        [Self::Duplicate, Self::Fraudulent, Self::RequestedByCustomer]
            .into_iter()
            .find(|reason| reason.name() == name)
    }

    /// Its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Duplicate => "duplicate",
            Self::Fraudulent => "fraudulent",
            Self::RequestedByCustomer => "requested_by_customer",
        }
    }
}

/// Money that was given back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refund {
    /// Given out when the request was parsed.
    pub id: RefundId,
    /// The request in which it was made.
    pub request_id: RequestId,
    /// Of which charge.
    pub charge: ChargeId,
    /// How much.
    pub amount: Amount,
    /// Of what.
    pub currency: Currency,
    /// Why.
    pub reason: Option<Reason>,
    /// For the merchant's programs.
    pub metadata: BTreeMap<String, String>,
}

impl Refund {
    /// What the client that asked for it is told. Refunds never change, so the
    /// bytes are the same whenever they are written.
    ///
    /// # Panics
    /// Never: it holds strings, integers and maps keyed by strings.
    #[must_use]
    pub fn answer(&self) -> Answer {
        let body = serde_json::to_string(&self.wire()).expect("a refund is plain data");
        Answer {
            status: 200,
            head: None,
            body: body.into(),
        }
    }

    /// In Stripe's shape.
    #[must_use]
    pub(crate) fn wire(&self) -> Wire<'_> {
        Wire {
            id: self.id,
            object: "refund",
            amount: self.amount,
            charge: self.charge,
            created: self.id.created_at().timestamp(),
            currency: self.currency,
            metadata: &self.metadata,
            reason: self.reason,
            status: "succeeded",
        }
    }
}

/// A refund as it stands in an answer.
#[derive(Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Wire<'a> {
    id: RefundId,
    /// `refund`
    object: &'a str,
    amount: Amount,
    charge: ChargeId,
    /// When it was made, in seconds since 1970.
    created: i64,
    currency: Currency,
    metadata: &'a BTreeMap<String, String>,
    #[schema(required)]
    reason: Option<Reason>,
    /// `succeeded`
    status: &'a str,
}

/// A row of `refunds`.
#[derive(FromRow)]
struct Row {
    refund_id: Uuid,
    request_id: Uuid,
    charge_id: Uuid,
    amount: i64,
    currency: String,
    reason: Option<String>,
    metadata: Json<BTreeMap<String, String>>,
}

impl TryFrom<Row> for Refund {
    type Error = sqlx::Error;

    fn try_from(row: Row) -> Result<Self, sqlx::Error> {
        let reason = match row.reason.as_deref().map(Reason::from_name) {
            Some(None) => return Err(corrupt_column("reason")),
            Some(reason) => reason,
            None => None,
        };
        Ok(Self {
            id: RefundId(row.refund_id),
            request_id: RequestId(row.request_id),
            charge: ChargeId(row.charge_id),
            amount: Amount::new(row.amount).ok_or_else(|| corrupt_column("amount"))?,
            currency: Currency::from_stored(&row.currency)
                .ok_or_else(|| corrupt_column("currency"))?,
            reason,
            metadata: row.metadata.0,
        })
    }
}

/// A refund with the key that it was asked for under, if it had one.
pub type Keyed<'a> = (&'a Scope, bool, Fingerprint, &'a Refund);

/// Writes refunds of charges that this transaction has locked.
///
/// # Errors
/// Any database error; nothing of the transaction may be kept then.
pub async fn insert(conn: &mut PgConnection, refunds: &[Keyed<'_>]) -> Result<(), sqlx::Error> {
    let made = || refunds.iter().map(|keyed| keyed.3);
    sqlx::query!(
        r#"
        insert into refunds (
            account_id, idempotency_key, request_hash, refund_id, charge_id, request_id, amount,
            currency, reason, metadata, created_at
        )
        select
            account_id, key, request_hash, refund_id, charge_id, request_id, amount, currency,
            reason, metadata::jsonb, created_at
        from unnest(
            $1::uuid[], $2::text[], $3::bytea[], $4::uuid[], $5::uuid[], $6::uuid[], $7::int8[],
            $8::text[], $9::text[], $10::text[], $11::timestamptz[]
        ) as input (
            account_id, key, request_hash, refund_id, charge_id, request_id, amount, currency,
            reason, metadata, created_at
        )
        "#,
        &refunds.iter().map(|r| r.0.account_id.0).collect::<Vec<_>>(),
        &refunds
            .iter()
            .map(|r| r.1.then(|| r.0.key.as_str()))
            .collect::<Vec<_>>() as &[Option<&str>],
        &refunds.iter().map(|r| r.2.as_bytes()).collect::<Vec<_>>() as &[&[u8]],
        &made().map(|r| r.id.0).collect::<Vec<_>>(),
        &made().map(|r| r.charge.0).collect::<Vec<_>>(),
        &made().map(|r| r.request_id.0).collect::<Vec<_>>(),
        &made().map(|r| r.amount.minor_units()).collect::<Vec<_>>(),
        &made().map(|r| r.currency.code()).collect::<Vec<_>>(),
        &made()
            .map(|r| r.reason.map(Reason::name))
            .collect::<Vec<_>>() as &[Option<&str>],
        &made()
            .map(|r| metadata_text(&r.metadata))
            .collect::<Vec<_>>(),
        &made().map(|r| r.id.created_at()).collect::<Vec<_>>(),
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// The refunds that carry these keys, with their fingerprints; `None` where no
/// refund does.
///
/// # Errors
/// Any database error.
pub async fn by_key(
    conn: &mut PgConnection,
    scopes: &[&Scope],
) -> Result<Vec<Option<(Fingerprint, Refund)>>, sqlx::Error> {
    #[derive(FromRow)]
    struct Found {
        position: i64,
        request_hash: Vec<u8>,
        #[sqlx(flatten)]
        row: Row,
    }

    // Not prepared: see `NonPersistent`.
    let query = sqlx::query!(
        r#"
        select input.position, refund.request_hash, refund.refund_id, refund.request_id,
            refund.charge_id, refund.amount, refund.currency, refund.reason, refund.metadata
        from unnest($1::uuid[], $2::text[]) with ordinality as input (account_id, key, position)
        cross join lateral (
            select * from refunds
            where refunds.account_id = input.account_id
              and refunds.idempotency_key = input.key collate "C"
            limit 1
        ) as refund
        "#,
        &scopes.iter().map(|s| s.account_id.0).collect::<Vec<_>>(),
        &scopes.iter().map(|s| s.key.as_str()).collect::<Vec<_>>() as &[&str],
    );
    let mut refunds = vec![None; scopes.len()];
    for row in sqlx::Executor::fetch_all(conn, crate::db::NonPersistent(query)).await? {
        let found = Found::from_row(&row)?;
        let fingerprint = Fingerprint::from_column(&found.request_hash)
            .ok_or_else(|| corrupt_column("request_hash"))?;
        refunds[position(found.position)] = Some((fingerprint, Refund::try_from(found.row)?));
    }
    Ok(refunds)
}

/// One refund of this account.
///
/// # Errors
/// Any database error.
pub async fn find(
    executor: impl PgExecutor<'_>,
    account_id: AccountId,
    refund_id: RefundId,
) -> Result<Option<Refund>, sqlx::Error> {
    sqlx::query_as!(
        Row,
        r#"
        select refund_id, request_id, charge_id, amount, currency, reason,
            metadata as "metadata: Json<BTreeMap<String, String>>"
        from refunds
        where account_id = $1 and refund_id = $2
        "#,
        account_id.0,
        refund_id.0,
    )
    .fetch_optional(executor)
    .await?
    .map(Refund::try_from)
    .transpose()
}

/// The refund that carries this key.
///
/// # Errors
/// Any database error.
pub async fn of_key(
    executor: impl PgExecutor<'_>,
    scope: &Scope,
) -> Result<Option<RefundId>, sqlx::Error> {
    let id = sqlx::query_scalar!(
        "select refund_id from refunds where account_id = $1 and idempotency_key = $2",
        scope.account_id.0,
        scope.key.as_str(),
    )
    .fetch_optional(executor)
    .await?;
    Ok(id.map(RefundId))
}

/// A page of this account's refunds, newest first; of one charge's, if one is
/// named.
///
/// # Errors
/// Any database error.
pub async fn list(
    executor: impl PgExecutor<'_>,
    account_id: AccountId,
    charge: Option<ChargeId>,
    page: &Page,
) -> Result<Vec<Refund>, sqlx::Error> {
    let (after, before) = page.bounds();
    let charge = charge.map(|charge| charge.0);
    let rows = if page.backwards() {
        sqlx::query_as!(
            Row,
            r#"
            select refund_id, request_id, charge_id, amount, currency, reason,
                metadata as "metadata: Json<BTreeMap<String, String>>"
            from refunds
            where account_id = $1 and refund_id > $2 and refund_id < $3
                and ($4::uuid is null or charge_id = $4)
            order by refund_id
            limit $5
            "#,
            account_id.0,
            after,
            before,
            charge,
            page.rows(),
        )
        .fetch_all(executor)
        .await?
    } else {
        sqlx::query_as!(
            Row,
            r#"
            select refund_id, request_id, charge_id, amount, currency, reason,
                metadata as "metadata: Json<BTreeMap<String, String>>"
            from refunds
            where account_id = $1 and refund_id > $2 and refund_id < $3
                and ($4::uuid is null or charge_id = $4)
            order by refund_id desc
            limit $5
            "#,
            account_id.0,
            after,
            before,
            charge,
            page.rows(),
        )
        .fetch_all(executor)
        .await?
    };
    rows.into_iter().map(Refund::try_from).collect()
}
