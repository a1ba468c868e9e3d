//! A layer that makes the handlers of any axum service idempotent, with that
//! service's own PostgreSQL.
//!
//! ```no_run
//! use axum::{Router, http::StatusCode, routing::post};
//! use payonce::{idempotency::Scenario, layer::{Idempotent, Tx}};
//! # async fn service(pool: sqlx::PgPool) -> Router {
//! async fn order(mut tx: Tx) -> StatusCode {
//!     // Commits together with the stored answer, or not at all.
//!     let done = sqlx::query("insert into orders default values").execute(&mut *tx).await;
//!     done.map_or(StatusCode::INTERNAL_SERVER_ERROR, |_| StatusCode::CREATED)
//! }
//!
//! let idempotent = Idempotent::new(pool, Scenario::Form.default_rule(), |request| {
//!     // Whose key it is: whoever you have found out the caller to be.
//!     request.headers.get("x-user")?.to_str().ok().map(str::to_owned)
//! });
//! Router::new().route("/orders", post(order)).layer(idempotent)
//! # }
//! ```
//!
//! The table is made by [`MIGRATION`], which goes into the service's own
//! migrations; [`purge::run_forever`](crate::idempotency::purge::run_forever)
//! removes what has expired.
//!
//! # What happens to a request
//!
//! Its key is claimed in a transaction, as a row without an answer: the lock. The
//! handler does its work in that very transaction ([`Tx`]), the answer goes into
//! the row, and COMMIT makes all of it true at once. Meanwhile duplicates wait,
//! and then get the stored answer; one with another request gets 422.
//!
//! | what | then |
//! | --- | --- |
//! | the handler answers, with a status that is stored (by default all below 500) | its writes and its answer are committed |
//! | it answers with another status | its writes are rolled back, nothing is stored, the client gets the answer; the key is free |
//! | it panics, or takes longer than its limit | rolled back; 500, or 503 |
//! | its answer is larger than the limit, or breaks off (a streamed one is read to its end first) | rolled back; 500 |
//! | it never takes the transaction | the answer alone is committed |
//! | it keeps the transaction beyond its answer, in a task | rolled back; 500 |
//! | it goes on after a statement that failed | rolled back; 500, whatever it answers: PostgreSQL keeps nothing of such a transaction |
//! | the client hangs up | nothing changes: the work goes on, and its retry is replayed |
//! | the process dies before COMMIT | nothing is there; the retry is the first request |
//! | it dies after COMMIT | all is there; the retry is replayed |
//! | the answer to COMMIT is lost | 503; the retry finds whichever of the two is true |
//! | another replica holds the key | the request waits, then gets 409 |
//!
//! In the transaction `statement_timeout` and
//! `idle_in_transaction_session_timeout` are the layer's, made of its time limit;
//! all other settings are those of the pool's session.
//!
//! Work that reaches beyond the database (an e-mail, a call) is not part of the
//! transaction and can happen twice: give it a key of its own, made of this
//! request's.

use std::{
    convert::Infallible,
    future::Future,
    ops::{Deref, DerefMut},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use axum::{
    body::{Body, Bytes, to_bytes},
    extract::{FromRequestParts, OriginalUri, Request},
    http::{
        HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header, request::Parts,
        response::Parts as Head,
    },
    response::{IntoResponse, Response},
};
use base64::{Engine, engine::general_purpose::STANDARD};
use rand::RngExt;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};
use sqlx::{AssertSqlSafe, Executor, PgConnection, PgPool, Postgres, Transaction, types::Uuid};
use tokio::{
    sync::{Mutex, OwnedMutexGuard},
    time::Instant,
};
use tower_layer::Layer;
use tower_service::Service;
use tracing::{Instrument, error, warn};

use crate::{
    db::{self, Trouble, describe},
    error::{Error, Unavailable},
    http::{command::read_body, exchange},
    idempotency::{
        self, Answer, Claimed, Duplicate, Fingerprint, Key, Rule, Scope,
        store::{self, KeyRow, NewRow},
    },
    ids::{AccountId, RequestId},
};

/// The table of keys, for the migrations of a service that uses the layer.
pub const MIGRATION: &str = include_str!("../migrations/0002_idempotency_keys.sql");

/// How long one step of the layer's own may take in the database.
const STEP_TIMEOUT: Duration = Duration::from_secs(4);

/// The layer. Cheap to clone.
#[derive(Clone)]
pub struct Idempotent {
    settings: Arc<Settings>,
}

type WhoseKey = dyn Fn(&Parts) -> Option<String> + Send + Sync;
type WhatCounts = dyn Fn(&Parts, &Bytes) -> Vec<u8> + Send + Sync;

#[derive(Clone)]
struct Settings {
    pool: PgPool,
    rule: Rule,
    whose: Arc<WhoseKey>,
    what_counts: Arc<WhatCounts>,
    stored: fn(StatusCode) -> bool,
    methods: Vec<Method>,
    key_required: bool,
    wait: Duration,
    time_limit: Duration,
    request_max: usize,
    answer_max: usize,
    headers: Vec<HeaderName>,
}

impl Idempotent {
    /// For handlers that work in `pool`, with keys that are kept by `rule`.
    ///
    /// `whose` says whose a request's key is: two callers may use the same text,
    /// and must not see each other's answers. `None` refuses the request with 401.
    pub fn new(
        pool: PgPool,
        rule: Rule,
        whose: impl Fn(&Parts) -> Option<String> + Send + Sync + 'static,
    ) -> Self {
        let settings = Settings {
            pool,
            rule,
            whose: Arc::new(whose),
            what_counts: Arc::new(|parts, body| meaning(&parts.headers, body)),
            stored: |status| status.as_u16() < 500,
            methods: vec![Method::POST, Method::PUT, Method::PATCH],
            key_required: true,
            wait: Duration::from_secs(2),
            time_limit: Duration::from_secs(10),
            request_max: 1 << 20,
            answer_max: 1 << 20,
            headers: vec![
                header::CONTENT_TYPE,
                header::CONTENT_ENCODING,
                header::LOCATION,
                header::ETAG,
            ],
        };
        Self {
            settings: Arc::new(settings),
        }
    }

    fn with(mut self, change: impl FnOnce(&mut Settings)) -> Self {
        change(Arc::make_mut(&mut self.settings));
        self
    }

    /// Which methods it is about, instead of POST, PUT and PATCH; the others pass.
    #[must_use]
    pub fn methods(self, methods: impl IntoIterator<Item = Method>) -> Self {
        self.with(|s| s.methods = methods.into_iter().collect())
    }

    /// Lets requests without a key through. Their handlers have a transaction as
    /// well, and nothing is stored.
    #[must_use]
    pub fn key_optional(self) -> Self {
        self.with(|s| s.key_required = false)
    }

    /// How long a duplicate of a running request waits before it gets 409.
    #[must_use]
    pub fn wait(self, wait: Duration) -> Self {
        self.with(|s| s.wait = wait)
    }

    /// How long a request's body may take to come, and then how long a handler may
    /// take, its answer's body included. A process that stands still holds a key
    /// no longer than this.
    /// At most 20 days, which is about as long as PostgreSQL can be told.
    #[must_use]
    pub fn time_limit(self, limit: Duration) -> Self {
        let (min, max) = (Duration::from_millis(1), Duration::from_hours(20 * 24));
        self.with(|s| s.time_limit = limit.clamp(min, max))
    }

    /// The largest request and the largest answer, in bytes, instead of 1 MiB.
    #[must_use]
    pub fn size_limits(self, request: usize, answer: usize) -> Self {
        self.with(|s| (s.request_max, s.answer_max) = (request, answer))
    }

    /// Which headers of an answer are stored and replayed, beside `Content-Type`
    /// and `Content-Encoding`; instead of `Location` and `ETag`.
    #[must_use]
    pub fn headers(self, headers: impl IntoIterator<Item = HeaderName>) -> Self {
        self.with(|s| {
            s.headers = vec![header::CONTENT_TYPE, header::CONTENT_ENCODING];
            s.headers.extend(headers);
        })
    }

    /// What of a request has to be the same under the same key, beside method,
    /// path and query; instead of the body, where JSON counts by what it says.
    #[must_use]
    pub fn fingerprint(
        self,
        what_counts: impl Fn(&Parts, &Bytes) -> Vec<u8> + Send + Sync + 'static,
    ) -> Self {
        self.with(|s| s.what_counts = Arc::new(what_counts))
    }

    /// Which answers are outcomes, to be committed and stored, by their status;
    /// instead of all below 500.
    #[must_use]
    pub fn stores(self, stored: fn(StatusCode) -> bool) -> Self {
        self.with(|s| s.stored = stored)
    }
}

/// The transaction in which the request's key was claimed: what is written here
/// commits with the stored answer, or not at all. Neither commit nor roll back
/// in it; `begin` makes a savepoint.
pub struct Tx(OwnedMutexGuard<Option<Transaction<'static, Postgres>>>);

/// How a handler gets at it.
#[derive(Clone)]
struct Handle(Arc<Mutex<Option<Transaction<'static, Postgres>>>>);

impl<S: Sync> FromRequestParts<S> for Tx {
    type Rejection = Response;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Response> {
        let handle = parts.extensions.get::<Handle>();
        let guard = handle.and_then(|Handle(held)| Arc::clone(held).try_lock_owned().ok());
        guard.map(Self).ok_or_else(|| {
            error!("no transaction: the layer does not cover this request, or it was taken twice");
            exchange::respond(&Error::Internal, RequestId::new())
        })
    }
}

impl Deref for Tx {
    type Target = PgConnection;

    fn deref(&self) -> &PgConnection {
        self.0
            .as_ref()
            .expect("it is taken back only when no handler has it")
    }
}

impl DerefMut for Tx {
    fn deref_mut(&mut self) -> &mut PgConnection {
        self.0
            .as_mut()
            .expect("it is taken back only when no handler has it")
    }
}

impl<S> Layer<S> for Idempotent {
    type Service = IdempotentService<S>;

    fn layer(&self, inner: S) -> IdempotentService<S> {
        IdempotentService {
            settings: Arc::clone(&self.settings),
            inner,
        }
    }
}

/// What [`Idempotent`] makes of a service.
#[derive(Clone)]
pub struct IdempotentService<S> {
    settings: Arc<Settings>,
    inner: S,
}

impl<S> Service<Request> for IdempotentService<S>
where
    S: Service<Request, Response = Response, Error = Infallible> + Clone + Send + 'static,
    S::Future: Send,
{
    type Response = Response;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request) -> Self::Future {
        let settings = Arc::clone(&self.settings);
        // The one that was made ready, and a clone in its place.
        let clone = self.inner.clone();
        let mut inner = std::mem::replace(&mut self.inner, clone);
        if !settings.methods.contains(request.method()) {
            return Box::pin(inner.call(request));
        }
        Box::pin(async move {
            let id = RequestId::new();
            let mut response = match settings.serve(request, id, inner).await {
                Ok(response) => response,
                Err(error) => exchange::respond(&error, id),
            };
            if let Ok(value) = HeaderValue::from_str(&id.to_string()) {
                response.headers_mut().insert("request-id", value);
            }
            Ok(response)
        })
    }
}

/// A request, read and understood.
struct Wish {
    id: RequestId,
    /// `None`: it has no key, and needs none.
    key: Option<(Scope, Fingerprint)>,
    operation_id: Uuid,
    request: Request,
}

impl Settings {
    async fn serve<S>(
        self: Arc<Self>,
        request: Request,
        id: RequestId,
        inner: S,
    ) -> Result<Response, Error>
    where
        S: Service<Request, Response = Response, Error = Infallible> + Send + 'static,
        S::Future: Send,
    {
        let (parts, body) = request.into_parts();
        let sent = parts.headers.get_all("idempotency-key").iter();
        let key = Key::from_headers(sent.map(HeaderValue::as_bytes)).map_err(Error::KeyInvalid)?;
        if key.is_none() && self.key_required {
            return Err(Error::KeyMissing);
        }
        let whose = (self.whose)(&parts).ok_or(Error::ApiKeyInvalid)?;
        let until = Instant::now() + self.time_limit;
        let body = read_body(&parts.headers, body, self.request_max, until).await?;
        let key = key.map(|key| {
            let account_id =
                AccountId(Uuid::from_slice(&Sha256::digest(whose)[..16]).unwrap_or_default());
            let counts = STANDARD.encode((self.what_counts)(&parts, &body));
            // A nested router takes its prefix off, and `/a/x` is not `/b/x`.
            let original = parts.extensions.get::<OriginalUri>();
            let uri = original.map_or(&parts.uri, |OriginalUri(uri)| uri);
            let path = uri.path_and_query().map_or("/", |path| path.as_str());
            let fingerprint = Fingerprint::new(parts.method.as_str(), path, &counts);
            (Scope { account_id, key }, fingerprint)
        });
        let wish = Wish {
            id,
            key,
            operation_id: Uuid::now_v7(),
            request: Request::from_parts(parts, Body::from(body)),
        };
        // Detached: the work goes on when the client hangs up and this future is
        // dropped. A panic ends the task, and with it the transaction.
        let work = async move { self.perform(wish, inner).await }.in_current_span();
        tokio::spawn(work).await.unwrap_or_else(|_| {
            error!(request_id = %id, "a handler panicked");
            Err(Error::Internal)
        })
    }

    async fn perform<S>(&self, wish: Wish, mut inner: S) -> Result<Response, Error>
    where
        S: Service<Request, Response = Response, Error = Infallible>,
    {
        let Wish {
            id,
            key,
            operation_id,
            mut request,
        } = wish;
        let row = key.as_ref().map(|(scope, fingerprint)| NewRow {
            scope,
            fingerprint: *fingerprint,
            digests: None,
            operation_id,
            request_id: id,
            answer: None,
            keep: self.rule.keep,
        });
        let transaction = match self.claim(row).await? {
            Got::Transaction(transaction) => transaction,
            Got::Row(found) => return self.duplicate(row, found),
        };

        let shared = Arc::new(Mutex::new(Some(transaction)));
        request.extensions_mut().insert(Handle(Arc::clone(&shared)));
        let answer = tokio::time::timeout(self.time_limit, async {
            let Ok(response) = inner.call(request).await;
            let (head, body) = response.into_parts();
            let body = to_bytes(body, self.answer_max).await;
            (head, body)
        })
        .await;
        // Whoever still has it is a task that the handler left behind.
        let taken = shared
            .try_lock_owned()
            .ok()
            .and_then(|mut shared| shared.take());
        let Some(mut transaction) = taken else {
            error!(request_id = %id, "a handler kept the transaction beyond its answer");
            return Err(Error::Internal);
        };
        let (head, body) = match answer {
            Ok((head, Ok(body))) => (head, body),
            Ok((_, Err(why))) => {
                error!(request_id = %id, %why, "an answer is too large, or broke off");
                return Err(Error::Internal);
            }
            Err(_) => {
                warn!(request_id = %id, "a handler took too long");
                return Err(Error::Unavailable(Unavailable::HandlerLate));
            }
        };
        if !(self.stored)(head.status) {
            step(transaction.rollback())
                .await
                .map_err(|error| fault(&error))?;
            return Ok(Response::from_parts(head, Body::from(body)));
        }
        if let Some(row) = row {
            let answer = self.to_answer(&head, &body);
            let row = NewRow {
                answer: Some(&answer),
                ..row
            };
            step(store::answer(&mut transaction, &[row])).await.map_err(|error| {
                error!(request_id = %id, error = %describe(&error), "the handler's transaction had failed or was ended");
                fault(&error)
            })?;
        } else {
            // PostgreSQL answers the COMMIT of a transaction that failed with
            // ROLLBACK, which sqlx takes for success.
            step(async { transaction.execute("select").await })
                .await
                .map_err(|error| fault(&error))?;
        }
        step(transaction.commit())
            .await
            .map_err(|error| fault(&error))?;
        Ok(Response::from_parts(head, Body::from(body)))
    }

    /// A transaction that has the key, or the row of whoever has it.
    async fn claim(&self, row: Option<NewRow<'_>>) -> Result<Got, Error> {
        let wait_until = Instant::now() + self.wait;
        loop {
            let error = match step(self.try_claim(row)).await {
                Ok(Some(got)) => return Ok(got),
                Ok(None) => Error::KeyInUse,
                Err(error) => match Trouble::of(&error) {
                    Trouble::RowLocked => Error::KeyInUse,
                    Trouble::Passing | Trouble::TableLocked | Trouble::TimedOut => {
                        Error::Unavailable(Unavailable::Database)
                    }
                    _ => return Err(fault(&error)),
                },
            };
            let pause = Duration::from_millis(rand::rng().random_range(10..=25));
            if Instant::now() + pause >= wait_until {
                return Err(error);
            }
            tokio::time::sleep(pause).await;
        }
    }

    /// `None`: somebody is at the key.
    async fn try_claim(&self, row: Option<NewRow<'_>>) -> Result<Option<Got>, sqlx::Error> {
        // Until the key is claimed nothing is waited for, and no plan reads the
        // table from end to end. The last two end the transaction of a process
        // that stands still, and the statement of a handler that was given up.
        let idle = self.time_limit.as_millis();
        let statement = idle + 1000;
        let begin = format!(
            "begin isolation level read committed; \
             select set_config('payonce.lock_timeout', current_setting('lock_timeout'), true), \
             set_config('payonce.enable_seqscan', current_setting('enable_seqscan'), true); \
             set local lock_timeout = '250ms'; \
             set local enable_seqscan = off; \
             set local idle_in_transaction_session_timeout = '{idle}ms'; \
             set local statement_timeout = '{statement}ms'"
        );
        let mut transaction = self.pool.begin_with(AssertSqlSafe(begin)).await?;
        if let Some(row) = row {
            match idempotency::claim(&mut transaction, &[row]).await?.pop() {
                Some(Claimed::Claimed) => {}
                Some(Claimed::Answered(found)) => {
                    transaction.rollback().await?;
                    return Ok(Some(Got::Row(found)));
                }
                Some(Claimed::InUse) | None => {
                    transaction.rollback().await?;
                    return Ok(None);
                }
            }
        }
        transaction
            .execute(
                "select set_config('lock_timeout', current_setting('payonce.lock_timeout'), true), \
                 set_config('enable_seqscan', current_setting('payonce.enable_seqscan'), true)",
            )
            .await?;
        Ok(Some(Got::Transaction(transaction)))
    }

    /// What a duplicate gets.
    fn duplicate(&self, row: Option<NewRow<'_>>, found: KeyRow) -> Result<Response, Error> {
        let ours = row.map(|row| row.fingerprint);
        if ours != Some(found.fingerprint) {
            return Err(if found.fingerprint.version() <= Fingerprint::of_nothing().version() {
                Error::KeyReused(None)
            } else {
                Error::Unavailable(Unavailable::NewerRelease)
            });
        }
        let mut response = match (self.rule.duplicate, found.answer) {
            (Duplicate::Refuse, _) => {
                return Err(Error::DuplicateRequest {
                    original: found.request_id,
                    charge: None,
                });
            }
            (Duplicate::Skip, _) => StatusCode::OK.into_response(),
            (Duplicate::Replay, Some(answer)) => from_answer(&answer).ok_or_else(|| {
                error!("a stored answer is none of this layer's");
                Error::Internal
            })?,
            (Duplicate::Replay, None) => return Err(Error::Internal),
        };
        let replayed = HeaderValue::from_static("true");
        response
            .headers_mut()
            .insert("idempotent-replayed", replayed);
        Ok(response)
    }

    fn to_answer(&self, head: &Head, body: &Bytes) -> Answer {
        let headers = self
            .headers
            .iter()
            .flat_map(|name| {
                let values = head.headers.get_all(name).iter();
                values.map(|value| (name.to_string(), STANDARD.encode(value)))
            })
            .collect();
        // Most answers are JSON, and are stored as what they are, byte for byte.
        let json = str::from_utf8(body)
            .ok()
            // Not RawValue: it takes what is nested deeper than PostgreSQL does.
            .filter(|text| serde_json::from_str::<Value>(text).is_ok());
        let stored = StoredHead {
            headers,
            body_is_base64: json.is_none(),
        };
        let body = match json {
            Some(json) => json.to_owned(),
            None => Value::String(STANDARD.encode(body)).to_string(),
        };
        Answer {
            status: head.status.as_u16(),
            head: serde_json::to_string(&stored).ok().map(Into::into),
            body: body.into(),
        }
    }
}

/// What a claim came to.
enum Got {
    Transaction(Transaction<'static, Postgres>),
    Row(KeyRow),
}

/// What belongs to an answer beside status and body; the `response_head` column.
#[derive(Serialize, Deserialize)]
struct StoredHead {
    /// Values in base64, since they need not be text.
    headers: Vec<(String, String)>,
    body_is_base64: bool,
}

/// `None` if the row was not written by this layer.
fn from_answer(answer: &Answer) -> Option<Response> {
    let stored: StoredHead = serde_json::from_str(answer.head.as_deref()?).ok()?;
    let body = if stored.body_is_base64 {
        let text: String = serde_json::from_str(&answer.body).ok()?;
        STANDARD.decode(text).ok()?
    } else {
        answer.body.as_bytes().to_vec()
    };
    let mut response = Response::new(Body::from(body));
    *response.status_mut() = StatusCode::from_u16(answer.status).ok()?;
    for (name, value) in stored.headers {
        let name = HeaderName::from_bytes(name.as_bytes()).ok()?;
        let value = HeaderValue::from_bytes(&STANDARD.decode(value).ok()?).ok()?;
        response.headers_mut().append(name, value);
    }
    Some(response)
}

/// A JSON body by what it says, any other by its bytes.
fn meaning(headers: &HeaderMap, body: &Bytes) -> Vec<u8> {
    let is_json = headers
        .get(header::CONTENT_TYPE)
        .and_then(|value| value.to_str().ok())
        .is_some_and(|value| value.starts_with("application/json"));
    let canonical = is_json
        .then(|| serde_json::from_slice::<Value>(body).ok())
        .flatten()
        .filter(is_exact)
        .and_then(|value| serde_json_canonicalizer::to_vec(&value).ok());
    canonical.unwrap_or_else(|| body.to_vec())
}

/// 2^53: up to here every integer is a double.
const EXACT: f64 = 9_007_199_254_740_992.0;

/// Whether the canonical form, whose numbers are doubles, tells this from others:
/// integers from 2^53 on are not told apart by it.
fn is_exact(value: &Value) -> bool {
    match value {
        Value::Number(number) => number.as_f64().is_some_and(|n| n.abs() < EXACT),
        Value::Array(items) => items.iter().all(is_exact),
        Value::Object(fields) => fields.values().all(is_exact),
        Value::Null | Value::Bool(_) | Value::String(_) => true,
    }
}

async fn step<T>(future: impl Future<Output = Result<T, sqlx::Error>>) -> Result<T, sqlx::Error> {
    db::within(STEP_TIMEOUT, future).await
}

/// What the client is told of an error of the database's. A transaction that
/// failed before is the handler's doing.
fn fault(error: &sqlx::Error) -> Error {
    let failed_before = error
        .as_database_error()
        .is_some_and(|error| error.code().as_deref() == Some("25P02"));
    if failed_before {
        return Error::Internal;
    }
    warn!(error = %describe(error), "a step of the layer failed");
    Trouble::of(error).into()
}
