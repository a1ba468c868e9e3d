//! Charges: what is asked for, what becomes of it, and the SQL of its table.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    time::Duration,
};

use serde::{Deserialize, Serialize};
use sqlx::{Executor, FromRow, PgConnection, PgExecutor, types::Json};
use utoipa::ToSchema;
use uuid::Uuid;

use crate::{
    db::{NonPersistent, corrupt_column, position},
    error::Error,
    idempotency::{
        Answer, Blank, FieldDigests, Fingerprint, Fingerprinted, Key, Rule, Scope,
        store::{self, NewRow},
    },
    ids::{AccountId, ChargeId, RequestId},
    money::{Amount, Currency},
    pagination::Page,
    processor::{Decline, Outcome},
};

/// The most names that metadata can hold.
pub const METADATA_ENTRIES_MAX: usize = 50;

/// What a client asks for, checked; its canonical form is what the
/// fingerprint is taken of, so two ways of writing the same operation are equal here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ChargeRequest {
    /// How much.
    pub amount: Amount,
    /// Of what.
    pub currency: Currency,
    /// The merchant's name for who pays.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub customer: Option<String>,
    /// The token of the card.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    /// For people.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    /// For the merchant's programs.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    #[schema(required = false)]
    pub metadata: BTreeMap<String, String>,
    /// Take the money now (`true`), or authorise only.
    #[serde(skip_serializing_if = "is_default_capture")]
    #[schema(required = false, default = true)]
    pub capture: bool,
}

/// A client that says what is the default asks for the same as one that does not.
#[expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "serde hands out a reference"
)]
fn is_default_capture(capture: &bool) -> bool {
    *capture
}

impl Fingerprinted for ChargeRequest {
    const OPTIONAL: &'static [(&'static str, Option<Blank>)] = &[
        ("customer", Some(Blank::Null)),
        ("source", Some(Blank::Null)),
        ("description", Some(Blank::Null)),
        ("metadata", Some(Blank::EmptyObject)),
        ("capture", Some(Blank::True)),
    ];
}

impl ChargeRequest {
    /// This much, taken now; everything else is left open.
    #[must_use]
    pub fn new(amount: Amount, currency: Currency) -> Self {
        Self {
            amount,
            currency,
            customer: None,
            source: None,
            description: None,
            metadata: BTreeMap::new(),
            capture: true,
        }
    }
}

/// Where a charge stands. `pending` leads to one of the others and nothing
/// leads back; the sandbox decides at once, so its charges begin at the end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Status {
    /// The processor has not said yet.
    Pending,
    /// The processor approved.
    Succeeded,
    /// The processor declined.
    Failed(Decline),
}

impl Status {
    fn name(&self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Succeeded => "succeeded",
            Self::Failed(_) => "failed",
        }
    }
}

/// A payment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Charge {
    /// Given out when the request was parsed.
    pub id: ChargeId,
    /// The request in which it was made.
    pub request_id: RequestId,
    /// What was asked for.
    pub request: ChargeRequest,
    /// What became of it.
    pub status: Status,
    /// What was taken of the amount, in minor units; 0 until it is captured.
    pub amount_captured: i64,
    /// What was given back, in minor units.
    pub amount_refunded: i64,
}

/// What a client wants changed, checked. Of what it leaves out nothing changes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ChargeUpdate {
    /// An empty text removes it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    /// Names with their new texts; an empty text removes the name.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    #[schema(required = false)]
    pub metadata: BTreeMap<String, String>,
    /// Removes all names that there were.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    #[schema(ignore)]
    pub clears_metadata: bool,
}

impl Fingerprinted for ChargeUpdate {
    const OPTIONAL: &'static [(&'static str, Option<Blank>)] = &[
        ("description", Some(Blank::Null)),
        ("metadata", Some(Blank::EmptyObject)),
        ("clears_metadata", Some(Blank::False)),
    ];
}

/// A change of a charge that its state does not allow. An outcome, not a fault:
/// it is stored, and replayed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// A capture of what was captured.
    AlreadyCaptured,
    /// A refund of what has nothing left, or a capture of what was cancelled.
    AlreadyRefunded,
    /// More than is left, which is this much.
    AmountTooLarge(i64),
    /// A part of what was only authorised cannot be refunded.
    NotCaptured,
    /// A capture of what did not succeed.
    NotCapturable,
    /// A refund of what did not succeed.
    NotRefundable,
    /// More metadata than a charge can hold.
    MetadataFull,
}

/// A validated create-charge command. The sandbox decides
/// without side effects, so the answer is known before the transaction and goes
/// into the key's row with the claim.
#[derive(Debug, Clone)]
pub struct CreateCharge {
    /// Whose key, and which.
    pub scope: Scope,
    /// Of the request.
    pub fingerprint: Fingerprint,
    /// Of its fields.
    pub digests: FieldDigests,
    /// How long the answer is kept, and what a duplicate gets.
    pub rule: Rule,
    /// Whether the key is the client's, and the charge carries it for good. The
    /// key of a request without one is forgotten with its row.
    pub keyed: bool,
    /// What it must not meet under another key.
    pub guard: Option<Guard>,
    /// The charge, if the key is free.
    pub charge: Charge,
    /// What the client gets, if the key is free.
    pub answer: Answer,
}

/// The guard against a client that mints a new key for each retry: a key of its
/// own that stands for account, customer, amount and currency, and is held for a
/// window by the first charge of them; what is let through beside it changes
/// nothing about that.
///
/// It is claimed in the charge's transaction, and not looked at before: of any
/// number of requests at once, on any number of replicas, one gets it.
#[derive(Debug, Clone)]
pub struct Guard {
    /// The guard's key.
    pub scope: Scope,
    /// Of what the key stands for.
    pub fingerprint: Fingerprint,
    /// How long a charge holds it.
    pub window: Duration,
    /// What becomes of a charge that finds it held.
    pub finds_another: FindsAnother,
}

/// What becomes of a charge that looks like another one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FindsAnother {
    /// It is made: the client says that it means it.
    Allowed,
    /// It is made, and the client is told.
    Warned,
    /// It is not made.
    Refused,
}

impl Guard {
    /// For a charge like this; `None` for one that no other can look like: it
    /// names no customer, or takes no money.
    #[must_use]
    pub fn of(
        charge: &Charge,
        account_id: AccountId,
        window: Duration,
        finds_another: FindsAnother,
    ) -> Option<Self> {
        let request = &charge.request;
        let customer = request.customer.as_deref()?;
        if charge.status != Status::Succeeded {
            return None;
        }
        let alike = (customer, request.amount, request.currency);
        // Version 1 for good: another release must find the same guard.
        let fingerprint = Fingerprint::version_1_of("", "", &alike);
        Some(Self {
            scope: Scope {
                account_id,
                key: Key::internal("guard", fingerprint.as_bytes()),
            },
            fingerprint,
            window,
            finds_another,
        })
    }
}

impl CreateCharge {
    /// About how much of it goes to the database, in bytes: the charge, the answer that
    /// repeats it, and what both have around them.
    #[must_use]
    pub fn bytes(&self) -> usize {
        2 * self.answer.body.len() + 512
    }

    /// The row of its key, as it stands once the charge is made.
    #[must_use]
    pub fn row(&self) -> NewRow<'_> {
        NewRow {
            scope: &self.scope,
            fingerprint: self.fingerprint,
            digests: Some(self.digests.as_bytes()),
            operation_id: self.charge.id.0,
            request_id: self.charge.request_id,
            answer: Some(&self.answer),
            keep: self.rule.keep,
        }
    }

    /// Its answer, where the guard warns of this charge beside it: a replay has to
    /// name it too.
    ///
    /// # Panics
    /// Never: an id is always JSON.
    #[must_use]
    pub fn answer_beside(&self, original: ChargeId) -> Answer {
        let head = AnswerHead {
            duplicate_of: original,
        };
        let head = serde_json::to_string(&head).expect("an id is always JSON");
        Answer {
            head: Some(head.into()),
            ..self.answer.clone()
        }
    }

    /// The row of its guard: held by this charge. There is nothing to answer.
    #[must_use]
    pub fn guard_row<'a>(&'a self, guard: &'a Guard, nothing: &'a Answer) -> NewRow<'a> {
        NewRow {
            scope: &guard.scope,
            fingerprint: guard.fingerprint,
            digests: None,
            keep: guard.window,
            answer: Some(nothing),
            ..self.row()
        }
    }
}

/// What is stored of a charge's answer beside status and body.
#[derive(Serialize, Deserialize)]
struct AnswerHead {
    duplicate_of: ChargeId,
}

/// The charge that the guard warned of when this answer was first given.
#[must_use]
pub fn duplicate_of(answer: &Answer) -> Option<ChargeId> {
    // A head of another form is of another kind of answer.
    let head: AnswerHead = serde_json::from_str(answer.head.as_deref()?).ok()?;
    Some(head.duplicate_of)
}

impl Charge {
    /// A charge that the processor has decided on.
    #[must_use]
    pub fn decided(request: ChargeRequest, outcome: Outcome, request_id: RequestId) -> Self {
        let status = match outcome {
            Outcome::Approved => Status::Succeeded,
            Outcome::Declined(decline) => Status::Failed(decline),
        };
        let captured = request.capture && status == Status::Succeeded;
        Self {
            id: ChargeId::new(),
            request_id,
            amount_captured: if captured {
                request.amount.minor_units()
            } else {
                0
            },
            amount_refunded: 0,
            request,
            status,
        }
    }

    /// Whether the money was taken, and not only authorised.
    #[must_use]
    pub fn captured(&self) -> bool {
        self.amount_captured > 0
    }

    /// What a refund can give back in all: what was captured, or, before that,
    /// what was authorised.
    fn refundable(&self) -> i64 {
        if self.captured() {
            self.amount_captured
        } else {
            self.request.amount.minor_units()
        }
    }

    /// Takes the money, or a part of it; the rest is released. Once.
    ///
    /// # Errors
    /// Why that cannot be; the charge is as before.
    pub fn capture(&mut self, amount: Option<Amount>) -> Result<(), Refusal> {
        let authorised = self.request.amount;
        if self.status != Status::Succeeded {
            return Err(Refusal::NotCapturable);
        }
        if self.captured() {
            return Err(Refusal::AlreadyCaptured);
        }
        if self.amount_refunded > 0 {
            return Err(Refusal::AlreadyRefunded);
        }
        let amount = amount.unwrap_or(authorised);
        if amount > authorised {
            return Err(Refusal::AmountTooLarge(authorised.minor_units()));
        }
        self.amount_captured = amount.minor_units();
        Ok(())
    }

    /// Gives back so much, or all that is left, and says how much that was. What
    /// was not captured can only be given back as a whole, which cancels it.
    ///
    /// # Errors
    /// Why that cannot be; the charge is as before.
    pub fn refund(&mut self, amount: Option<Amount>) -> Result<Amount, Refusal> {
        if self.status != Status::Succeeded {
            return Err(Refusal::NotRefundable);
        }
        let left = Amount::new(self.refundable() - self.amount_refunded)
            .ok_or(Refusal::AlreadyRefunded)?;
        let amount = amount.unwrap_or(left);
        if amount > left {
            return Err(Refusal::AmountTooLarge(left.minor_units()));
        }
        if !self.captured() && amount < left {
            return Err(Refusal::NotCaptured);
        }
        self.amount_refunded += amount.minor_units();
        Ok(amount)
    }

    /// Merges what is new into what there is, as Stripe does.
    ///
    /// # Errors
    /// If that would be too much; the charge is as before.
    pub fn update(&mut self, update: &ChargeUpdate) -> Result<(), Refusal> {
        let mut metadata = if update.clears_metadata {
            BTreeMap::new()
        } else {
            self.request.metadata.clone()
        };
        for (name, text) in &update.metadata {
            if text.is_empty() {
                metadata.remove(name);
            } else {
                metadata.insert(name.clone(), text.clone());
            }
        }
        if metadata.len() > METADATA_ENTRIES_MAX {
            return Err(Refusal::MetadataFull);
        }
        self.request.metadata = metadata;
        if let Some(description) = &update.description {
            self.request.description = Some(description.clone()).filter(|text| !text.is_empty());
        }
        Ok(())
    }

    /// What the client that asked for this charge is told. A charge that has not
    /// changed gives the same bytes, so an answer that has expired can be written
    /// again; one that was captured, refunded or updated since says so.
    #[must_use]
    pub fn answer(&self) -> Answer {
        match &self.status {
            Status::Failed(decline) => {
                let error = Error::Declined {
                    decline: decline.clone(),
                    charge: self.id,
                };
                Answer {
                    status: error.status(),
                    head: None,
                    body: error.body(self.request_id).into(),
                }
            }
            Status::Pending | Status::Succeeded => Answer {
                status: 200,
                head: None,
                body: self.to_json().into(),
            },
        }
    }

    /// The charge in Stripe's shape.
    ///
    /// # Panics
    /// Never: it holds strings, booleans, integers and maps keyed by strings.
    #[must_use]
    pub fn to_json(&self) -> String {
        serde_json::to_string(&self.wire()).expect("a charge is plain data and always JSON")
    }

    /// The charge in Stripe's shape, to be a part of a larger body.
    #[must_use]
    pub(crate) fn wire(&self) -> Wire<'_> {
        let request = &self.request;
        let decline = match &self.status {
            Status::Failed(decline) => Some(decline),
            Status::Pending | Status::Succeeded => None,
        };
        Wire {
            id: self.id,
            object: "charge",
            amount: request.amount,
            amount_captured: self.amount_captured,
            amount_refunded: self.amount_refunded,
            captured: self.captured(),
            created: self.id.created_at().timestamp(),
            currency: request.currency,
            customer: request.customer.as_deref(),
            description: request.description.as_deref(),
            failure_code: decline.map(|d| d.code.as_str()),
            failure_message: decline.map(|d| d.message.as_str()),
            livemode: false,
            metadata: &request.metadata,
            outcome: WireOutcome::of(&self.status),
            paid: self.status == Status::Succeeded,
            refunded: self.amount_refunded > 0 && self.amount_refunded == self.refundable(),
            source: request.source.as_deref(),
            status: self.status.name(),
        }
    }
}

/// A charge as it stands in an answer.
#[derive(Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[expect(clippy::struct_excessive_bools, reason = "Stripe's shape")]
pub(crate) struct Wire<'a> {
    id: ChargeId,
    /// `charge`
    object: &'a str,
    amount: Amount,
    /// What was taken of the amount; 0 until the capture.
    amount_captured: i64,
    /// What was given back.
    amount_refunded: i64,
    captured: bool,
    /// When it was made, in seconds since 1970.
    created: i64,
    currency: Currency,
    #[schema(required)]
    customer: Option<&'a str>,
    #[schema(required)]
    description: Option<&'a str>,
    /// Why it failed, if it did.
    #[schema(required)]
    failure_code: Option<&'a str>,
    #[schema(required)]
    failure_message: Option<&'a str>,
    /// Always false: the sandbox moves no money.
    livemode: bool,
    metadata: &'a BTreeMap<String, String>,
    #[schema(required)]
    outcome: Option<WireOutcome<'a>>,
    paid: bool,
    /// Whether all of it was given back.
    refunded: bool,
    #[schema(required)]
    source: Option<&'a str>,
    /// `pending`, `succeeded` or `failed`
    status: &'a str,
}

/// Stripe's `outcome`: how the decision came about.
#[derive(Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct WireOutcome<'a> {
    network_status: &'a str,
    #[schema(required)]
    reason: Option<&'a str>,
    risk_level: &'a str,
    seller_message: &'a str,
    r#type: &'a str,
}

impl<'a> WireOutcome<'a> {
    fn of(status: &'a Status) -> Option<Self> {
        match status {
            Status::Pending => None,
            Status::Succeeded => Some(Self {
                network_status: "approved_by_network",
                reason: None,
                risk_level: "normal",
                seller_message: "Payment complete.",
                r#type: "authorized",
            }),
            Status::Failed(decline) => Some(Self {
                network_status: "declined_by_network",
                reason: Some(decline.decline_code.as_deref().unwrap_or(&decline.code)),
                risk_level: "normal",
                seller_message: &decline.message,
                r#type: "issuer_declined",
            }),
        }
    }
}

/// A row of `charges`.
#[derive(sqlx::FromRow)]
struct Row {
    charge_id: Uuid,
    request_id: Uuid,
    amount: i64,
    currency: String,
    customer: Option<String>,
    source: Option<String>,
    description: Option<String>,
    metadata: Json<BTreeMap<String, String>>,
    capture: bool,
    amount_captured: i64,
    amount_refunded: i64,
    status: String,
    failure_code: Option<String>,
    decline_code: Option<String>,
    failure_message: Option<String>,
}

impl TryFrom<Row> for Charge {
    type Error = sqlx::Error;

    /// What we did not write ourselves is not a charge of ours: an error, and
    /// never a guess.
    fn try_from(row: Row) -> Result<Self, sqlx::Error> {
        let status = match (row.status.as_str(), row.failure_code) {
            ("pending", None) => Status::Pending,
            ("succeeded", None) => Status::Succeeded,
            ("failed", Some(code)) => Status::Failed(Decline {
                code,
                decline_code: row.decline_code,
                message: row.failure_message.unwrap_or_default(),
            }),
            _ => return Err(corrupt_column("status")),
        };
        Ok(Self {
            id: ChargeId(row.charge_id),
            request_id: RequestId(row.request_id),
            request: ChargeRequest {
                amount: Amount::new(row.amount).ok_or_else(|| corrupt_column("amount"))?,
                currency: Currency::from_stored(&row.currency)
                    .ok_or_else(|| corrupt_column("currency"))?,
                customer: row.customer,
                source: row.source,
                description: row.description,
                metadata: row.metadata.0,
                capture: row.capture,
            },
            status,
            amount_captured: row.amount_captured,
            amount_refunded: row.amount_refunded,
        })
    }
}

/// What became of a claim that this transaction made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CreateClaim {
    /// The key was free, and the charge is new.
    Charged,
    /// The key's row was gone, but a charge carries the key already: a retry
    /// after the purge. The row holds an answer that was never true and has to
    /// be replaced before the commit.
    ChargeExists,
}

impl CreateClaim {
    fn by(charged: bool) -> Self {
        if charged {
            Self::Charged
        } else {
            Self::ChargeExists
        }
    }
}

/// Claims the keys and makes the charges: one statement for the whole batch.
/// For each command says what became of it; `None` where the key was not to be
/// had, because its row is there or because another transaction is at it.
///
/// The only statement that writes two tables: apart it would be two round
/// trips, and the round trips are what a batch costs.
///
/// The try-lock keeps the batch from waiting for a key that another replica
/// holds; it decides nothing, the row does. Rows go in ordered by account and
/// key, so that two batches cannot wait for each other in a circle.
///
/// # Errors
/// Any database error; nothing of the transaction may be kept then.
pub async fn claim_and_insert(
    conn: &mut PgConnection,
    commands: &[&CreateCharge],
) -> Result<Vec<Option<CreateClaim>>, sqlx::Error> {
    macro_rules! column {
        ($command:ident => $value:expr) => {
            commands.iter().map(|$command| $value).collect::<Vec<_>>()
        };
    }
    let failure = |c: &&CreateCharge| match &c.charge.status {
        Status::Failed(decline) => Some(decline.clone()),
        Status::Pending | Status::Succeeded => None,
    };
    let rows = sqlx::query!(
        r#"
        with input as (
            select * from unnest(
                $1::uuid[], $2::text[], $3::bytea[], $4::uuid[], $5::int2[], $6::text[],
                $7::int8[], $8::text[], $9::text[], $10::text[], $11::text[], $12::text[],
                $13::bool[], $14::text[], $15::text[], $16::text[], $17::text[], $18::timestamptz[], $19::uuid[],
                $20::float8[], $21::bool[], $22::bytea[]
            ) as input (
                account_id, key, request_hash, charge_id, response_status, response_body,
                amount, currency, customer, source, description, metadata,
                capture, status, failure_code, decline_code, failure_message, created_at, request_id,
                keep, keyed, field_digests
            )
        ),
        claimed as (
            insert into idempotency_keys (
                account_id, key, request_hash, operation_id, request_id, response_status,
                response_body, created_at, expires_at, field_digests
            )
            select
                account_id, key, request_hash, charge_id, request_id, response_status,
                response_body::json, statement_timestamp(),
                statement_timestamp() + make_interval(secs => keep), field_digests
            from input
            where pg_try_advisory_xact_lock(hashtextextended(key, uuid_hash_extended(account_id, 0)))
            order by account_id, key collate "C"
            on conflict do nothing
            returning account_id, key, operation_id as charge_id
        ),
        charged as (
            insert into charges (
                account_id, charge_id, idempotency_key, request_hash, amount, currency, customer,
                source, description, metadata, capture, status, failure_code, decline_code,
                failure_message, created_at, request_id, amount_captured
            )
            select
                account_id, charge_id, case when keyed then input.key end, request_hash, amount, currency, customer,
                source, description, metadata::jsonb, capture, status, failure_code, decline_code,
                failure_message, input.created_at, request_id,
                case when capture and status = 'succeeded' then amount else 0 end
            from input
            join claimed using (account_id, charge_id)
            where claimed.key = input.key collate "C"
            on conflict do nothing
            returning charge_id
        )
        select claimed.charge_id, charged.charge_id is not null as "charged!"
        from claimed
        left join charged using (charge_id)
        "#,
        &column!(c => c.scope.account_id.0),
        &column!(c => c.scope.key.as_str()) as &[&str],
        &column!(c => c.fingerprint.as_bytes()) as &[&[u8]],
        &column!(c => c.charge.id.0),
        &column!(c => c.answer.status.cast_signed()),
        &column!(c => &*c.answer.body) as &[&str],
        &column!(c => c.charge.request.amount.minor_units()),
        &column!(c => c.charge.request.currency.code()),
        &column!(c => c.charge.request.customer.as_deref()) as &[Option<&str>],
        &column!(c => c.charge.request.source.as_deref()) as &[Option<&str>],
        &column!(c => c.charge.request.description.as_deref()) as &[Option<&str>],
        &column!(c => metadata_text(&c.charge.request.metadata)),
        &column!(c => c.charge.request.capture),
        &column!(c => c.charge.status.name()) as &[&str],
        &column!(c => failure(c).map(|d| d.code)) as &[Option<String>],
        &column!(c => failure(c).and_then(|d| d.decline_code)) as &[Option<String>],
        &column!(c => failure(c).map(|d| d.message)) as &[Option<String>],
        &column!(c => c.charge.id.created_at()),
        &column!(c => c.charge.request_id.0),
        &column!(c => c.rule.keep.as_secs_f64()),
        &column!(c => c.keyed),
        &column!(c => c.digests.as_bytes()) as &[&[u8]],
    )
    .fetch_all(conn)
    .await?;

    let claims: HashMap<_, _> = rows.into_iter().map(|r| (r.charge_id, r.charged)).collect();
    let ids = commands.iter().map(|c| c.charge.id.0);
    Ok(ids
        .map(|id| claims.get(&id).map(|&charged| CreateClaim::by(charged)))
        .collect())
}

pub(crate) fn metadata_text(metadata: &BTreeMap<String, String>) -> String {
    serde_json::to_string(metadata).expect("a map of strings is always JSON")
}

/// Takes back what this transaction has just claimed and charged, for commands
/// that must not be done after all: nobody has seen it.
///
/// # Errors
/// Any database error.
pub async fn undo_create(
    conn: &mut PgConnection,
    commands: &[&CreateCharge],
) -> Result<(), sqlx::Error> {
    let scopes: Vec<_> = commands.iter().map(|c| &c.scope).collect();
    store::release(conn, &scopes).await?;
    let query = sqlx::query!(
        r#"
        delete from charges
        where ctid = any (array(
            select made.id
            from unnest($1::uuid[], $2::uuid[]) as input (account_id, charge_id)
            cross join lateral (
                select charges.ctid as id from charges
                where charges.account_id = input.account_id
                  and charges.charge_id = input.charge_id
                limit 1
            ) as made
        ))
        "#,
        &commands
            .iter()
            .map(|c| c.scope.account_id.0)
            .collect::<Vec<_>>(),
        &commands.iter().map(|c| c.charge.id.0).collect::<Vec<_>>(),
    );
    conn.execute(NonPersistent(query)).await?;
    Ok(())
}

/// The charges that carry these keys, with their fingerprints; `None` where no
/// charge does.
///
/// # Errors
/// Any database error.
pub async fn by_key(
    conn: &mut PgConnection,
    scopes: &[&Scope],
) -> Result<Vec<Option<(Fingerprint, Charge)>>, sqlx::Error> {
    #[derive(sqlx::FromRow)]
    struct Found {
        position: i64,
        request_hash: Vec<u8>,
        #[sqlx(flatten)]
        row: Row,
    }

    // A lateral subquery with a limit cannot be planned as a join that reads
    // the whole table. Which index it takes is another matter: see `NonPersistent`.
    let query = sqlx::query!(
        r#"
        select input.position, charge.charge_id, charge.request_id, charge.request_hash, charge.amount,
            charge.currency, charge.customer, charge.source, charge.description, charge.metadata,
            charge.capture, charge.amount_captured,
            charge.amount_refunded, charge.status, charge.failure_code, charge.decline_code,
            charge.failure_message
        from unnest($1::uuid[], $2::text[]) with ordinality as input (account_id, key, position)
        cross join lateral (
            select * from charges
            where charges.account_id = input.account_id
              and charges.idempotency_key = input.key collate "C"
            limit 1
        ) as charge
        "#,
        &scopes.iter().map(|s| s.account_id.0).collect::<Vec<_>>(),
        &scopes.iter().map(|s| s.key.as_str()).collect::<Vec<_>>() as &[&str],
    );
    let mut charges = vec![None; scopes.len()];
    for row in conn.fetch_all(NonPersistent(query)).await? {
        let found = Found::from_row(&row)?;
        let fingerprint = Fingerprint::from_column(&found.request_hash)
            .ok_or_else(|| corrupt_column("request_hash"))?;
        charges[position(found.position)] = Some((fingerprint, Charge::try_from(found.row)?));
    }
    Ok(charges)
}

/// Those of these charges that are there, each of its account.
///
/// # Errors
/// Any database error.
pub async fn find(
    conn: &mut PgConnection,
    ids: &[(AccountId, ChargeId)],
) -> Result<HashMap<(AccountId, ChargeId), Charge>, sqlx::Error> {
    #[derive(sqlx::FromRow)]
    struct Found {
        account_id: Uuid,
        #[sqlx(flatten)]
        row: Row,
    }

    let query = sqlx::query!(
        r#"
        select charge.account_id, charge.charge_id, charge.request_id, charge.amount,
            charge.currency, charge.customer, charge.source, charge.description, charge.metadata,
            charge.capture, charge.amount_captured, charge.amount_refunded, charge.status,
            charge.failure_code, charge.decline_code, charge.failure_message
        from unnest($1::uuid[], $2::uuid[]) as input (account_id, charge_id)
        cross join lateral (
            select * from charges
            where charges.account_id = input.account_id
              and charges.charge_id = input.charge_id
            limit 1
        ) as charge
        "#,
        &ids.iter().map(|id| id.0.0).collect::<Vec<_>>(),
        &ids.iter().map(|id| id.1.0).collect::<Vec<_>>(),
    );
    let mut charges = HashMap::new();
    for row in conn.fetch_all(NonPersistent(query)).await? {
        let found = Found::from_row(&row)?;
        let charge = Charge::try_from(found.row)?;
        charges.insert((AccountId(found.account_id), charge.id), charge);
    }
    Ok(charges)
}

/// The charge that carries this key.
///
/// # Errors
/// Any database error.
pub async fn of_key(
    executor: impl PgExecutor<'_>,
    scope: &Scope,
) -> Result<Option<ChargeId>, sqlx::Error> {
    let id = sqlx::query_scalar!(
        "select charge_id from charges where account_id = $1 and idempotency_key = $2",
        scope.account_id.0,
        scope.key.as_str(),
    )
    .fetch_optional(executor)
    .await?;
    Ok(id.map(ChargeId))
}

/// A page of this account's charges, newest first; of one customer's, if one is
/// named. Ids begin with the time, so the primary key is the order.
///
/// # Errors
/// Any database error.
pub async fn list(
    executor: impl PgExecutor<'_>,
    account_id: AccountId,
    customer: Option<&str>,
    page: &Page,
) -> Result<Vec<Charge>, sqlx::Error> {
    let (after, before) = page.bounds();
    // One statement for each direction, so that an index always does the work;
    // and planned per execution, so that a customer who is not named costs none.
    let rows = if page.backwards() {
        sqlx::query_as!(
            Row,
            r#"
            select charge_id, request_id, amount, currency, customer, source, description,
                metadata as "metadata: Json<BTreeMap<String, String>>", capture,
                amount_captured, amount_refunded, status, failure_code, decline_code, failure_message
            from charges
            where account_id = $1 and charge_id > $2 and charge_id < $3
                and ($4::text is null or customer = $4)
            order by charge_id
            limit $5
            "#,
            account_id.0,
            after,
            before,
            customer,
            page.rows(),
        )
        .fetch_all(executor)
        .await?
    } else {
        sqlx::query_as!(
            Row,
            r#"
            select charge_id, request_id, amount, currency, customer, source, description,
                metadata as "metadata: Json<BTreeMap<String, String>>", capture,
                amount_captured, amount_refunded, status, failure_code, decline_code, failure_message
            from charges
            where account_id = $1 and charge_id > $2 and charge_id < $3
                and ($4::text is null or customer = $4)
            order by charge_id desc
            limit $5
            "#,
            account_id.0,
            after,
            before,
            customer,
            page.rows(),
        )
        .fetch_all(executor)
        .await?
    };
    rows.into_iter().map(Charge::try_from).collect()
}

/// A charge that is locked, and what stands beside it.
#[derive(Debug)]
pub struct Locked {
    /// As it is now, and stays until the transaction ends.
    pub charge: Charge,
    /// Where its row is, until it is saved.
    pub row: String,
}

/// Locks charges, each `(account, charge)` once, in their order. Leaves out those
/// that are not there, and those that another transaction holds: to wait for one
/// would keep the whole batch waiting, and halving it all others.
///
/// Whoever else locks them does it in the order of the ids too, so two batches
/// cannot wait for each other in a circle.
///
/// # Errors
/// Any database error.
pub async fn lock(
    conn: &mut PgConnection,
    ids: &BTreeSet<(AccountId, ChargeId)>,
) -> Result<HashMap<(AccountId, ChargeId), Locked>, sqlx::Error> {
    #[derive(sqlx::FromRow)]
    struct Found {
        account_id: Uuid,
        id: String,
        #[sqlx(flatten)]
        row: Row,
    }

    // The rows are locked as the loop over the input comes to them.
    let query = sqlx::query!(
        r#"
        select charge.account_id, charge.id, charge.charge_id, charge.request_id, charge.amount,
            charge.currency, charge.customer, charge.source, charge.description, charge.metadata,
            charge.capture, charge.amount_captured, charge.amount_refunded, charge.status,
            charge.failure_code, charge.decline_code, charge.failure_message
        from unnest($1::uuid[], $2::uuid[]) as input (account_id, charge_id)
        cross join lateral (
            select *, charges.ctid::text as id from charges
            where charges.account_id = input.account_id
              and charges.charge_id = input.charge_id
            limit 1
            for update skip locked
        ) as charge
        "#,
        &ids.iter().map(|id| id.0.0).collect::<Vec<_>>(),
        &ids.iter().map(|id| id.1.0).collect::<Vec<_>>(),
    );
    let mut locked = HashMap::new();
    for row in conn.fetch_all(NonPersistent(query)).await? {
        let found = Found::from_row(&row)?;
        let charge = Charge::try_from(found.row)?;
        let key = (AccountId(found.account_id), charge.id);
        locked.insert(
            key,
            Locked {
                charge,
                row: found.id,
            },
        );
    }
    Ok(locked)
}

/// Which of these charges there are, whoever holds them.
///
/// # Errors
/// Any database error.
pub async fn existing_ids(
    conn: &mut PgConnection,
    ids: &BTreeSet<(AccountId, ChargeId)>,
) -> Result<HashSet<(AccountId, ChargeId)>, sqlx::Error> {
    let query = sqlx::query!(
        r#"
        select charge.account_id, charge.charge_id
        from unnest($1::uuid[], $2::uuid[]) as input (account_id, charge_id)
        cross join lateral (
            select charges.account_id, charges.charge_id from charges
            where charges.account_id = input.account_id
              and charges.charge_id = input.charge_id
            limit 1
        ) as charge
        "#,
        &ids.iter().map(|id| id.0.0).collect::<Vec<_>>(),
        &ids.iter().map(|id| id.1.0).collect::<Vec<_>>(),
    );
    let mut there = HashSet::new();
    for row in conn.fetch_all(NonPersistent(query)).await? {
        let (account_id, charge_id) = <(Uuid, Uuid)>::from_row(&row)?;
        there.insert((AccountId(account_id), ChargeId(charge_id)));
    }
    Ok(there)
}

/// Writes what has changed of charges that this transaction has locked.
///
/// # Errors
/// Any database error.
pub async fn save(conn: &mut PgConnection, changed: &[&Locked]) -> Result<(), sqlx::Error> {
    let charges = || changed.iter().map(|locked| &locked.charge);
    let query = sqlx::query!(
        r#"
        update charges set
            amount_captured = input.amount_captured,
            amount_refunded = input.amount_refunded,
            description = input.description,
            metadata = input.metadata::jsonb
        from unnest($1::text[], $2::int8[], $3::int8[], $4::text[], $5::text[])
            as input (id, amount_captured, amount_refunded, description, metadata)
        where charges.ctid = input.id::tid
        "#,
        &changed
            .iter()
            .map(|locked| &*locked.row)
            .collect::<Vec<_>>() as &[&str],
        &charges().map(|c| c.amount_captured).collect::<Vec<_>>(),
        &charges().map(|c| c.amount_refunded).collect::<Vec<_>>(),
        &charges()
            .map(|c| c.request.description.as_deref())
            .collect::<Vec<_>>() as &[Option<&str>],
        &charges()
            .map(|c| metadata_text(&c.request.metadata))
            .collect::<Vec<_>>(),
    );
    let saved = query.execute(conn).await?;
    if usize::try_from(saved.rows_affected()) != Ok(changed.len()) {
        return Err(sqlx::Error::RowNotFound);
    }
    Ok(())
}
