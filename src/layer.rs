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
//! | the handler answers with a status below 400 | its writes and its answer are committed |
//! | with one from 400 to 499 | its answer is committed and its writes are rolled back |
//! | with 401, 407, 408, 421, 425, 429, or 500 and above | its writes are rolled back, nothing is stored, the client gets the answer; the key is free |
//! | it panics, or takes longer than its limit | rolled back; 500, or 503 |
//! | its answer is larger than the limit, or breaks off (a streamed one is read to its end first) | rolled back; 500 |
//! | it never takes the transaction | the answer alone is committed |
//! | it keeps the transaction beyond its answer, in a task | rolled back; 500 |
//! | it goes on after a statement that failed, and answers below 400 | rolled back; 500, whatever it answers: PostgreSQL keeps nothing of such a transaction |
//! | a `begin` of its own in the transaction is cancelled or fails | the transaction is lost: using it again panics, and any answer becomes 500 |
//! | the client hangs up | nothing changes: the work goes on, and its retry is replayed |
//! | the process dies before COMMIT | nothing is there; the retry is the first request |
//! | it dies after COMMIT | all is there; the retry is replayed |
//! | the answer to COMMIT is lost, or does not come in time | 503; the retry finds whichever of the two is true |
//! | another replica holds the key | the request waits, then gets 409 |
//!
//! # Which answers are outcomes
//!
//! [`Completion`] says what becomes of an answer and of the writes before it. By
//! default it is made of the status:
//!
//! - A success or a redirect is an outcome, and its writes are the work.
//! - A refusal (4xx) is an outcome too: whoever asks again is refused again, even
//!   if it would be let through by now. Its writes are rolled back, as they are
//!   when a handler of any axum service returns early and drops its transaction. A
//!   handler that met a constraint can so answer 409 with the transaction failed.
//! - An answer that says "not now" or "not like this" and will be another one when
//!   the same is sent again is no outcome: 401 and 407 (credentials that were
//!   missing or had expired), 408, 421, 425 and 429 (RFC 9110, 8470 and 6585: the
//!   client is meant to repeat the request). Nothing is stored, and the key is
//!   free. Stripe stores neither 401 nor 429; the IETF's draft of the header leaves
//!   it to the service.
//! - A fault (5xx) never is one: what it would replay was never done. Stripe does
//!   store 500s, since its work can be half done then; here it was rolled back.
//!
//! A handler whose refusals have to leave something behind (a failed attempt that
//! is counted, a declined payment) says so for one answer, by putting the
//! [`Completion`] into the response's extensions:
//!
//! ```
//! use axum::{Extension, http::StatusCode, response::IntoResponse};
//! use payonce::layer::{Completion, Tx};
//! async fn pay(mut tx: Tx) -> impl IntoResponse {
//!     // … insert into payments … values ('declined') …
//!     (StatusCode::PAYMENT_REQUIRED, Extension(Completion::Commit), "declined")
//! }
//! # let _ = axum::routing::post::<_, _, ()>(pay);
//! ```
//!
//! or for all of them with [`Idempotent::completes`].
//!
//! # What else holds in the transaction
//!
//! `statement_timeout` and `idle_in_transaction_session_timeout` are the layer's,
//! made of its time limit; all other settings are those of the pool's session. A
//! handler may `set local` what it likes, `role` and `search_path` too: the answer
//! is stored with those that were in force before it, and COMMIT, with its deferred
//! constraints, finds the handler's again.
//!
//! A connection goes back to the pool only when the end of its transaction is
//! certain, and is closed otherwise. A COMMIT that does not come back keeps its
//! place in the pool for up to five minutes: it may wait for a standby.
//!
//! Duplicates within the process wait in memory for what the first one finds. Only
//! that one asks the database again while another replica holds the key, at growing
//! intervals, and all such requests together use a quarter of the pool's
//! connections at most. Clones of one [`Idempotent`] share that; make one, and
//! clone it.
//!
//! Work that reaches beyond the database (an e-mail, a call) is not part of the
//! transaction and can happen twice: give it a key of its own, made of this
//! request's.

mod in_flight;
mod meaning;
mod session;

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
        HeaderName, HeaderValue, Method, StatusCode, header, request::Parts,
        response::Parts as Head,
    },
    response::{IntoResponse, Response},
};
use backon::{BackoffBuilder, ExponentialBuilder};
use base64::{Engine, engine::general_purpose::STANDARD};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};
use sqlx::{Executor, FromRow, PgConnection, PgPool, Row, types::Uuid};
use tokio::{
    sync::{Mutex, OwnedMutexGuard, Semaphore},
    time::{Instant, timeout_at},
};
use tower_layer::Layer;
use tower_service::Service;
use tracing::{Instrument, error, warn};

use crate::{
    db::{self, ErrorClass, describe, replication},
    error::{Error, Unavailable},
    http::{command::read_body, request_context},
    idempotency::{
        self, Answer, Duplicate, Fingerprint, Key, KeyClaim, Rule, Scope,
        store::{self, KeyRow, NewRow},
    },
    ids::{AccountId, RequestId},
};
use in_flight::{InFlight, Lead, Turn};
use session::Session;

/// The table of keys, for the migrations of a service that uses the layer.
pub const MIGRATION: &str = include_str!("../migrations/0002_idempotency_keys.sql");

/// Which part of the pool's connections may ask again for keys that are in use.
const POLLS_PART: u32 = 4;

/// The pauses between two looks at a key that another replica holds: from 10 ms
/// to a tenth of a second, with as much again of jitter.
fn poll_pauses() -> impl Iterator<Item = Duration> {
    ExponentialBuilder::default()
        .with_min_delay(Duration::from_millis(10))
        .with_factor(1.5)
        .with_max_delay(Duration::from_millis(100))
        .with_jitter()
        .without_max_times()
        .build()
}

/// What becomes of a handler's answer, and of what it wrote before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Completion {
    /// Both are committed; the answer is replayed from now on.
    Commit,
    /// The answer is committed, and replayed from now on; the writes are rolled
    /// back.
    CommitAnswer,
    /// Nothing is committed, and the key is free: the same request may be sent
    /// again.
    RollBack,
}

impl Completion {
    /// The default: see [the module](self#which-answers-are-outcomes).
    #[must_use]
    pub fn of(status: StatusCode) -> Self {
        match status.as_u16() {
            401 | 407 | 408 | 421 | 425 | 429 | 500.. => Self::RollBack,
            400..=499 => Self::CommitAnswer,
            _ => Self::Commit,
        }
    }
}

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
    /// `None`: the body, by its meaning.
    what_counts: Option<Arc<WhatCounts>>,
    completes: fn(StatusCode) -> Completion,
    methods: Vec<Method>,
    key_required: bool,
    wait: Duration,
    time_limit: Duration,
    step_limit: Duration,
    request_max: usize,
    answer_max: usize,
    headers: Vec<HeaderName>,
    in_flight: Arc<InFlight>,
    /// A permit per look at a key that was in use.
    polls: Arc<Semaphore>,
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
        let polls = (pool.options().get_max_connections() / POLLS_PART).max(1);
        let settings = Settings {
            pool,
            rule,
            whose: Arc::new(whose),
            what_counts: None,
            completes: Completion::of,
            methods: vec![Method::POST, Method::PUT, Method::PATCH],
            key_required: true,
            wait: Duration::from_secs(2),
            time_limit: Duration::from_secs(10),
            step_limit: Duration::from_secs(4),
            request_max: 1 << 20,
            answer_max: 1 << 20,
            headers: vec![
                header::CONTENT_TYPE,
                header::CONTENT_ENCODING,
                header::LOCATION,
                header::ETAG,
            ],
            in_flight: Arc::default(),
            polls: Arc::new(Semaphore::new(polls as usize)),
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

    /// How long one step of the layer's own (the claim of a key, an answer that is
    /// stored, a COMMIT) may take in the database before the request gets 503;
    /// instead of 4 s.
    #[must_use]
    pub fn step_limit(self, limit: Duration) -> Self {
        self.with(|s| s.step_limit = limit)
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
        self.with(|s| s.what_counts = Some(Arc::new(what_counts)))
    }

    /// What becomes of an answer, and of the writes before it, by its status;
    /// instead of [`Completion::of`]. A [`Completion`] in the answer's own
    /// extensions counts more.
    #[must_use]
    pub fn completes(self, completes: fn(StatusCode) -> Completion) -> Self {
        self.with(|s| s.completes = completes)
    }
}

/// The transaction in which the request's key was claimed: what is written here
/// commits with the stored answer, or not at all. Neither commit nor roll back
/// in it; `begin` makes a savepoint.
///
/// # Panics
/// If it is used after a `begin` in it was cancelled (by a time-out, or a
/// `select!`) or failed. sqlx 0.9.0 has rolled the whole transaction back then,
/// and statements would be committed one by one. A `&mut PgConnection` that was
/// taken before is not guarded: take it anew (`&mut *tx`) after a `begin`.
pub struct Tx(OwnedMutexGuard<Option<Session>>);

/// How a handler gets at it.
#[derive(Clone)]
struct Handle(Arc<Mutex<Option<Session>>>);

impl<S: Sync> FromRequestParts<S> for Tx {
    type Rejection = Response;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Response> {
        let handle = parts.extensions.get::<Handle>();
        let guard = handle.and_then(|Handle(held)| Arc::clone(held).try_lock_owned().ok());
        guard.map(Self).ok_or_else(|| {
            error!("no transaction: the layer does not cover this request, or it was taken twice");
            request_context::respond(&Error::Internal, RequestId::new())
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
        let session = self
            .0
            .as_mut()
            .expect("it is taken back only when no handler has it");
        assert!(
            session.depth() > 0,
            "the transaction was lost: a `begin` in it was cancelled, or failed"
        );
        session
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
                Err(error) => request_context::respond(&error, id),
            };
            if let Ok(value) = HeaderValue::from_str(&id.to_string()) {
                response.headers_mut().insert("request-id", value);
            }
            Ok(response)
        })
    }
}

/// A request, read and understood.
struct PreparedRequest {
    id: RequestId,
    /// `None`: it has no key, and needs none.
    key: Option<(Scope, Counted)>,
    operation_id: Uuid,
    request: Request,
}

/// What of a request has to be the same under the same key.
struct Counted {
    fingerprint: Fingerprint,
    method: Method,
    path: String,
    /// For a fingerprint of version 1, if one is met.
    version_1: Box<dyn Fn() -> Vec<u8> + Send + Sync>,
}

impl Counted {
    fn of(settings: &Settings, parts: &Parts, body: &Bytes) -> Self {
        // A nested router takes its prefix off, and `/a/x` is not `/b/x`.
        let original = parts.extensions.get::<OriginalUri>();
        let uri = original.map_or(&parts.uri, |OriginalUri(uri)| uri);
        let path = uri.path_and_query().map_or("/", |path| path.as_str());
        let (counts, version_1): (_, Box<dyn Fn() -> Vec<u8> + Send + Sync>) =
            if let Some(what_counts) = &settings.what_counts {
                let counts = what_counts(parts, body);
                (counts.clone(), Box::new(move || counts.clone()))
            } else {
                let (headers, body) = (parts.headers.clone(), body.clone());
                let counts = meaning::meaning(&headers, &body);
                let version_1 = move || meaning::version_1(&headers, &body);
                (counts, Box::new(version_1))
            };
        let digest = STANDARD.encode(Sha256::digest(counts));
        Self {
            fingerprint: Fingerprint::new(parts.method.as_str(), path, &digest),
            method: parts.method.clone(),
            path: path.to_owned(),
            version_1,
        }
    }

    /// Whether a row is of this request, by the rule of the release that wrote it;
    /// `None` if that is newer than this one.
    fn is_that_of(&self, row: Fingerprint) -> Option<bool> {
        match row.version() {
            1 => {
                let counts = STANDARD.encode((self.version_1)());
                let method = self.method.as_str();
                Some(row == Fingerprint::version_1_of(method, &self.path, &counts))
            }
            version if version == self.fingerprint.version() => Some(row == self.fingerprint),
            _ => None,
        }
    }
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
            let counted = Counted::of(&self, &parts, &body);
            (Scope { account_id, key }, counted)
        });
        let prepared = PreparedRequest {
            id,
            key,
            operation_id: Uuid::now_v7(),
            request: Request::from_parts(parts, Body::from(body)),
        };
        // Detached: the work goes on when the client hangs up and this future is
        // dropped. A panic ends the task, and with it the transaction.
        let work = async move { self.perform(prepared, inner).await }.in_current_span();
        tokio::spawn(work).await.unwrap_or_else(|_| {
            error!(request_id = %id, "a handler panicked");
            Err(Error::Internal)
        })
    }

    async fn perform<S>(&self, prepared: PreparedRequest, inner: S) -> Result<Response, Error>
    where
        S: Service<Request, Response = Response, Error = Infallible>,
    {
        let wait_until = Instant::now() + self.wait;
        let PreparedRequest {
            id,
            key,
            operation_id,
            request,
        } = prepared;
        let Some((scope, counted)) = key else {
            let claim = self.claim(operation_id, None, wait_until).await?;
            let ClaimResult::Transaction(claimed) = claim else {
                return Err(Error::Internal);
            };
            let done = self.run(id, request, inner, claimed, None).await?;
            return Ok(done.response);
        };
        let row = NewRow {
            scope: &scope,
            fingerprint: counted.fingerprint,
            digests: None,
            operation_id,
            request_id: id,
            answer: None,
            keep: self.rule.keep,
        };
        let lead = loop {
            match self.in_flight.enter(&scope) {
                Turn::Lead(lead) => break lead,
                Turn::Follow(follow) => match timeout_at(wait_until, follow.told()).await {
                    Ok(Some(found)) => return self.duplicate(&counted, &found),
                    // It met a fault, or waited in vain, on its own clock.
                    Ok(None) => {}
                    Err(_) => return Err(Error::KeyInUse),
                },
            }
        };
        self.lead(lead, row, &counted, request, inner, wait_until)
            .await
    }

    /// The first request of this process that is at its key.
    async fn lead<S>(
        &self,
        lead: Lead,
        row: NewRow<'_>,
        counted: &Counted,
        request: Request,
        inner: S,
        wait_until: Instant,
    ) -> Result<Response, Error>
    where
        S: Service<Request, Response = Response, Error = Infallible>,
    {
        match self.claim(row.operation_id, Some(row), wait_until).await? {
            ClaimResult::Row(found) => {
                let found = Arc::new(found);
                lead.tell(Arc::clone(&found));
                self.duplicate(counted, &found)
            }
            ClaimResult::Transaction(claimed) => {
                let id = row.request_id;
                let done = self.run(id, request, inner, claimed, Some(row)).await?;
                if let Some(answer) = done.stored {
                    lead.tell(Arc::new(KeyRow {
                        fingerprint: row.fingerprint,
                        digests: None,
                        operation_id: row.operation_id,
                        request_id: id,
                        answer: Some(answer),
                        expired: false,
                        written_by: None,
                    }));
                }
                Ok(done.response)
            }
        }
    }

    /// Has the handler do its work, and ends the transaction by what it answers.
    async fn run<S>(
        &self,
        id: RequestId,
        mut request: Request,
        mut inner: S,
        claimed: Claim,
        row: Option<NewRow<'_>>,
    ) -> Result<Done, Error>
    where
        S: Service<Request, Response = Response, Error = Infallible>,
    {
        let Claim {
            session,
            environment,
            operation_id,
        } = claimed;
        let shared = Arc::new(Mutex::new(Some(session)));
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
        let Some(mut session) = taken else {
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
        if session.depth() != 1 {
            error!(request_id = %id, "a handler's `begin` was cancelled, failed, or never ended");
            return Err(Error::Internal);
        }
        let completion = head.extensions.get::<Completion>().copied();
        let completion = completion.unwrap_or_else(|| (self.completes)(head.status));
        let ended = match (completion, row) {
            (Completion::RollBack, _) | (Completion::CommitAnswer, None) => {
                self.step(session.roll_back()).await.map(|()| None)
            }
            (Completion::CommitAnswer, Some(row)) => {
                let answer = self.to_answer(&head, &body);
                let stored = self.step(store_alone(&mut session, row, &answer)).await;
                self.commit(session, stored).await.map(|()| Some(answer))
            }
            (Completion::Commit, Some(row)) => {
                let answer = self.to_answer(&head, &body);
                let stored = store_beside(&mut session, environment, row, &answer);
                let stored = self.step(stored).await;
                self.commit(session, stored).await.map(|()| Some(answer))
            }
            (Completion::Commit, None) => {
                let same = self.step(is_the_same(&mut session, operation_id)).await;
                self.commit(session, same).await.map(|()| None)
            }
        };
        let stored = ended.map_err(|error| {
            let error = fault(&error);
            if error == Error::Internal {
                error!(request_id = %id, "the handler's transaction had failed or was ended");
            }
            error
        })?;
        Ok(Done {
            response: Response::from_parts(head, Body::from(body)),
            stored,
        })
    }

    /// Commits what is `ready`. Nothing of the transaction may be kept otherwise,
    /// and its connection is closed.
    async fn commit(
        &self,
        session: Session,
        ready: Result<(), sqlx::Error>,
    ) -> Result<(), sqlx::Error> {
        ready?;
        self.step(session.commit()).await
    }

    async fn step<T>(
        &self,
        future: impl Future<Output = Result<T, sqlx::Error>>,
    ) -> Result<T, sqlx::Error> {
        db::within(self.step_limit, future).await
    }

    /// A transaction that has the key, or the row of whoever has it.
    async fn claim(
        &self,
        operation_id: Uuid,
        row: Option<NewRow<'_>>,
        wait_until: Instant,
    ) -> Result<ClaimResult, Error> {
        let mut pauses = poll_pauses();
        let mut permit = None;
        loop {
            let claim = self.try_claim(operation_id, row);
            let error = match self.step(claim).await {
                Ok(Some(got)) => return Ok(got),
                Ok(None) => Error::KeyInUse,
                Err(error) => match ErrorClass::of(&error) {
                    ErrorClass::RowLocked => Error::KeyInUse,
                    ErrorClass::Transient | ErrorClass::TableLocked | ErrorClass::TimedOut => {
                        Error::Unavailable(Unavailable::Database)
                    }
                    _ => return Err(fault(&error)),
                },
            };
            drop(permit.take());
            let pause = pauses.next().unwrap_or_default();
            if Instant::now() + pause >= wait_until {
                return Err(error);
            }
            tokio::time::sleep(pause).await;
            match timeout_at(wait_until, self.polls.acquire()).await {
                Ok(Ok(next)) => permit = Some(next),
                Ok(Err(_)) | Err(_) => return Err(error),
            }
        }
    }

    /// `None`: somebody is at the key.
    async fn try_claim(
        &self,
        operation_id: Uuid,
        row: Option<NewRow<'_>>,
    ) -> Result<Option<ClaimResult>, sqlx::Error> {
        // Until the key is claimed nothing is waited for, and no plan reads the
        // table from end to end. The last two end the transaction of a process
        // that stands still, and the statement of a handler that was given up.
        let idle = self.time_limit.as_millis();
        let statement = idle + 1000;
        let begin = format!(
            "begin isolation level read committed; \
             select set_config('payonce.lock_timeout', current_setting('lock_timeout'), true), \
             set_config('payonce.enable_seqscan', current_setting('enable_seqscan'), true), \
             set_config('payonce.transaction', '{operation_id}', true); \
             set local lock_timeout = '250ms'; \
             set local enable_seqscan = off; \
             set local idle_in_transaction_session_timeout = '{idle}ms'; \
             set local statement_timeout = '{statement}ms'"
        );
        let mut session = Session::begin(&self.pool, begin).await?;
        if let Some(row) = row {
            let claims = match idempotency::claim(&mut session, &[row]).await {
                Ok(claims) => claims,
                // The server has spoken: the connection is as good as before.
                Err(error @ sqlx::Error::Database(_)) => {
                    session.roll_back().await?;
                    return Err(error);
                }
                Err(error) => return Err(error),
            };
            match claims.into_iter().next() {
                Some(KeyClaim::Claimed) => {}
                Some(KeyClaim::Answered(found)) => {
                    give_again(session, &found).await?;
                    return Ok(Some(ClaimResult::Row(found)));
                }
                Some(KeyClaim::InUse) | None => {
                    session.roll_back().await?;
                    return Ok(None);
                }
            }
        }
        let environment = hand_over(&mut session).await?;
        Ok(Some(ClaimResult::Transaction(Claim {
            session,
            environment,
            operation_id,
        })))
    }

    /// What a duplicate gets.
    fn duplicate(&self, counted: &Counted, found: &KeyRow) -> Result<Response, Error> {
        match counted.is_that_of(found.fingerprint) {
            Some(true) => {}
            Some(false) => return Err(Error::KeyReused(None)),
            None => return Err(Error::Unavailable(Unavailable::NewerRelease)),
        }
        let mut response = match (self.rule.duplicate, &found.answer) {
            (Duplicate::Refuse, _) => {
                return Err(Error::DuplicateRequest {
                    original: found.request_id,
                    charge: None,
                });
            }
            (Duplicate::Skip, _) => StatusCode::OK.into_response(),
            (Duplicate::Replay, Some(answer)) => from_answer(answer).ok_or_else(|| {
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
enum ClaimResult {
    Transaction(Claim),
    /// Read in a transaction that is committed.
    Row(KeyRow),
}

/// A transaction that has its key, or needs none.
struct Claim {
    session: Session,
    environment: Environment,
    operation_id: Uuid,
}

/// What a request came to whose handler was run.
struct Done {
    response: Response,
    /// What was committed with the key.
    stored: Option<Answer>,
}

/// What the layer's own statements depend on, and a handler may `set local`.
#[derive(Debug, PartialEq, Eq, FromRow)]
struct Environment {
    session_authorization: String,
    role: String,
    search_path: String,
    row_security: String,
}

/// Ends a transaction that read the answer of another one. Every replay goes through
/// here before it is given: where there are synchronous standbys, it waits until one
/// has what it replays ([`replication`]).
async fn give_again(mut session: Session, found: &KeyRow) -> Result<(), sqlx::Error> {
    session.has_standbys = found.written_by.is_some();
    if session.has_standbys {
        replication::leave_record(&mut session).await?;
    }
    session.commit().await
}

/// Makes the transaction the handler's: lock time-out and planner as the pool's
/// session has them, and a savepoint to go back to. One round trip.
async fn hand_over(session: &mut Session) -> Result<Environment, sqlx::Error> {
    let rows = session
        .fetch_all(
            "select pg_catalog.set_config('lock_timeout', current_setting('payonce.lock_timeout'), true), \
             pg_catalog.set_config('enable_seqscan', current_setting('payonce.enable_seqscan'), true), \
             current_setting('session_authorization') as session_authorization, \
             current_setting('role') as role, \
             current_setting('search_path') as search_path, \
             current_setting('row_security') as row_security, \
             current_setting('synchronous_standby_names') <> '' as has_standbys, \
             case when current_setting('client_min_messages') = 'error' then \
                 pg_catalog.set_config('client_min_messages', 'warning', true) end; \
             savepoint payonce_handler",
        )
        .await?;
    let row = rows.first().ok_or(sqlx::Error::RowNotFound)?;
    // A warning is how the server says that a COMMIT did not wait for its standby.
    session.has_standbys = row.try_get("has_standbys")?;
    Environment::from_row(row)
}

/// Sets what is set otherwise, and gives what was set before.
async fn exchange_environment(
    conn: &mut PgConnection,
    wanted: &Environment,
) -> Result<Environment, sqlx::Error> {
    // Materialized: read before any of it is set. The session's user comes first,
    // since a change of it resets the role. Qualified, since the handler's
    // search_path is in force.
    sqlx::query_as(
        "with found as materialized (
            select pg_catalog.current_setting('session_authorization') as session_authorization,
                pg_catalog.current_setting('role') as role,
                pg_catalog.current_setting('search_path') as search_path,
                pg_catalog.current_setting('row_security') as row_security
        )
        select found.*,
            case when session_authorization operator(pg_catalog.<>) $1 then
                pg_catalog.set_config('session_authorization', $1, true) end,
            case when role operator(pg_catalog.<>) $2 or session_authorization operator(pg_catalog.<>) $1 then
                pg_catalog.set_config('role', $2, true) end,
            case when search_path operator(pg_catalog.<>) $3 then
                pg_catalog.set_config('search_path', $3, true) end,
            case when row_security operator(pg_catalog.<>) $4 then
                pg_catalog.set_config('row_security', $4, true) end
        from found",
    )
    .bind(&wanted.session_authorization)
    .bind(&wanted.role)
    .bind(&wanted.search_path)
    .bind(&wanted.row_security)
    .fetch_all(conn)
    .await?
    .pop()
    .ok_or(sqlx::Error::RowNotFound)
}

/// Stores the answer beside the handler's writes. One round trip more where the
/// handler has changed the environment.
async fn store_beside(
    session: &mut Session,
    environment: Environment,
    row: NewRow<'_>,
    answer: &Answer,
) -> Result<(), sqlx::Error> {
    let handlers = exchange_environment(session, &environment).await?;
    let answer = Some(answer);
    store::answer(session, &[NewRow { answer, ..row }]).await?;
    if handlers != environment {
        // COMMIT runs deferred constraints and triggers, which are the handler's.
        exchange_environment(session, &handlers).await?;
    }
    Ok(())
}

/// Stores the answer, and undoes whatever the handler wrote and set, also if a
/// statement of its failed.
async fn store_alone(
    session: &mut Session,
    row: NewRow<'_>,
    answer: &Answer,
) -> Result<(), sqlx::Error> {
    session
        .execute("rollback to savepoint payonce_handler")
        .await?;
    let answer = Some(answer);
    store::answer(session, &[NewRow { answer, ..row }]).await
}

/// Whether the transaction is still the one that was begun. PostgreSQL answers
/// the COMMIT of one that failed with ROLLBACK, and that of none with a warning,
/// and sqlx takes both for success.
async fn is_the_same(session: &mut Session, operation_id: Uuid) -> Result<(), sqlx::Error> {
    let found: Option<Option<String>> =
        sqlx::query_scalar("select pg_catalog.current_setting('payonce.transaction', true)")
            .fetch_all(&mut **session)
            .await?
            .pop();
    match found.flatten() {
        Some(found) if found == operation_id.to_string() => Ok(()),
        _ => Err(sqlx::Error::RowNotFound),
    }
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
    ErrorClass::of(error).into()
}
