//! A client that asks until it knows, and says what is certain.
//!
//! The key is minted when an [`Operation`] is described, not when it is sent, so
//! there is no way to send one operation under two keys by retrying it: every attempt
//! carries the operation's key and the operation's bytes.
//!
//! ```no_run
//! use payonce::charges::ChargeRequest;
//! use payonce::client::{Client, Operation};
//! use payonce::money::{Amount, Currency};
//!
//! # async fn pay(api_key: &str) -> Result<(), Box<dyn std::error::Error>> {
//! let amount = Amount::new(5000).ok_or("no amount")?;
//! let currency = Currency::from_code("usd").ok_or("no currency")?;
//! let operation = Operation::charge(&ChargeRequest::new(amount, currency));
//! // Write the operation down before it is sent: whoever comes after a crash
//! // can then ask with the same key.
//! let written = serde_json::to_string(&operation)?;
//!
//! let client = Client::new("http://127.0.0.1:8080", api_key)?;
//! match client.send(&operation).await {
//!     Ok(charged) => println!("charged: {}", charged.charge.id),
//!     Err(failure) if failure.certainly_not_charged() => println!("{failure}"),
//!     Err(failure) => println!("{failure}: send the very operation again"),
//! }
//! # Ok(())
//! # }
//! ```
//!
//! # What is asked again
//!
//! | what came back | what is done |
//! | --- | --- |
//! | no connection, a time-out, a reset, an answer that breaks off | again |
//! | an answer with `Stripe-Should-Retry` | as it says |
//! | 409, 429, 5xx without it | again |
//! | 2xx that is no charge | again: it was not the service that said it |
//! | a charge, a decline | the outcome, whatever the header says |
//! | 422 for the key | the end, whatever the header says |
//! | anything else, redirects too | the end |
//!
//! Between two attempts it waits for `Retry-After` (seconds), and on top of that
//! for a random time from nothing to a step that doubles (full jitter: clients
//! that failed together do not come back together). A wait that would not
//! leave time for an attempt before the deadline is not begun.
//!
//! # What is certain
//!
//! Some answers speak of the *key*, and a key names one charge forever: the charge
//! carries it for as long as it exists. They are certain whatever became of earlier
//! attempts:
//!
//! - a charge: charged, once;
//! - 402: the key's outcome is a decline, so an attempt whose answer was lost was
//!   declined too, or never arrived;
//! - 422 `idempotency_key_reused` whose `differs` names fields of a charge: the key
//!   is another charge's, for good. Had one of our attempts charged, it would be
//!   ours, so none has, and none ever will. *This* request charged nobody. The other
//!   one may have: who changed the amount of a operation and kept the key should look at
//!   that one before taking a new key.
//!
//! Across kinds of operation it is not so. A key that was used for a capture, a
//! refund or an update is remembered as long as that answer is kept (24 hours by
//! default), and free for a charge afterwards; a charge's key can be taken by a
//! capture once the charge's own answer has expired. So a 422 that names `path`, or
//! does not say what differs, proves that its own attempt did nothing, and no more:
//! an earlier attempt may have charged, and the same request may charge once the
//! other's answer has expired. [`Failure::certainly_not_charged`] is false for it.
//! `GET /v1/idempotency_keys/{key}` tells whether there is a charge; the operation
//! should not be sent again.
//!
//! All others speak of the *attempt*. A 401 or a 400 says that this attempt did
//! nothing; it does not say that the one before, whose answer was lost, did
//! nothing (the API key may have been revoked in between). The same goes for a
//! refused connection. So an operation counts its doubts: an attempt is one from
//! the moment it begins, also if the future is dropped in the middle, and stops
//! being one only when it is proved harmless: no connection was made, so no byte
//! was sent; or the service itself refused with a 4xx whose body says that the
//! same key is of no use. Only with no doubt left is it [`Failure::Refused`] or
//! [`Failure::NotSent`], else [`Failure::Unknown`].
//!
//! An operation that was read from where it was written down, or was given a key
//! by [`Operation::with_key`], begins with a doubt: nobody here knows whether it
//! was sent before. Clones share their doubts.
//!
//! 409, 429 and 5xx prove nothing: the first attempt may be at work, and a 503
//! may come after the commit. A body that is not the service's own (a gateway's
//! page) proves nothing either, whatever its status.
//!
//! A gateway that sends a POST twice by its own account takes the certainty from
//! [`Failure::Refused`], since nobody here sees the first of the two.
//!
//! All of it holds for one service and one account: keys belong to accounts, so
//! an operation that is sent with another account's API key, or to another
//! deployment, is another charge.

pub mod command;
pub mod health;
mod operation;
mod outcome;

pub use operation::{MalformedOperation, Operation};
pub use outcome::{Charge, Charged, Decline, Failure, Last, Refusal, Status};

use std::time::{Duration, Instant};

use backon::{BackoffBuilder, ExponentialBuilder};
use rand::RngExt;
use reqwest::{
    Response,
    header::{AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderValue, RETRY_AFTER},
};
use tracing::debug;

use outcome::Problem;

/// How long a connection may take to come about. Apart from the attempt's limit,
/// since a connection that was never made is certain to have charged nobody.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// With less time left no further attempt is begun: its time-out would put a
/// doubt where there may be none.
const ATTEMPT_MIN: Duration = Duration::from_millis(250);

/// The first and the largest step of the backoff.
const STEP_MIN: Duration = Duration::from_millis(250);
const STEP_MAX: Duration = Duration::from_secs(8);

/// The largest answer that is read, in bytes; the service's are far smaller.
const ANSWER_MAX: usize = 1 << 20;

/// How long a [`Client`] tries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settings {
    /// How long one attempt may take, its answer included; 15 seconds, since the
    /// service answers within 10.
    pub attempt_timeout: Duration,
    /// How long [`Client::send`] takes at most, with all attempts and waits; 30
    /// seconds.
    pub deadline: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            attempt_timeout: Duration::from_secs(15),
            deadline: Duration::from_secs(30),
        }
    }
}

/// Why there is no client. Repeats neither the URL nor the API key.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ClientError {
    /// Not the URL of a service.
    #[error("the URL has to be like http://127.0.0.1:8080, without user, query and fragment")]
    BaseUrl,
    /// It cannot stand in a header.
    #[error("the API key holds characters that no API key has")]
    ApiKey,
    /// The HTTP client could not be made; mostly its TLS.
    #[error("no HTTP client: {0}")]
    Http(String),
}

/// Sends operations to one service as one account. Cheap to clone, and its
/// connections are shared.
#[derive(Debug, Clone)]
pub struct Client {
    http: reqwest::Client,
    charges_url: String,
    /// Marked as sensitive, so that no `Debug` shows it.
    authorization: HeaderValue,
    settings: Settings,
}

/// What one attempt brought.
enum Attempt {
    /// The outcome of the key, which no other attempt can change.
    Settled(Result<Charged, Failure>),
    Missed(Miss),
}

struct Miss {
    last: Last,
    again: bool,
    /// What the service wants waited for.
    retry_after: Duration,
}

impl Client {
    /// A client of the service at `base_url` (`http://127.0.0.1:8080`; a path
    /// before `/v1` is kept), with the default [`Settings`]. Does not connect.
    ///
    /// # Errors
    /// If the URL or the API key cannot be used, or TLS cannot be set up.
    pub fn new(base_url: &str, api_key: &str) -> Result<Self, ClientError> {
        let base_url = check_base_url(base_url)?;
        let mut authorization =
            HeaderValue::from_str(&format!("Bearer {api_key}")).map_err(|_| ClientError::ApiKey)?;
        authorization.set_sensitive(true);
        // Fails only if a provider is there already, and then there is one.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let http = reqwest::Client::builder()
            .connect_timeout(CONNECT_TIMEOUT)
            // A redirected POST could become a GET, or another host's.
            .redirect(reqwest::redirect::Policy::none())
            // Who counts doubts has to see every attempt.
            .retry(reqwest::retry::never())
            .build()
            .map_err(|error| ClientError::Http(cause(&error)))?;
        Ok(Self {
            http,
            charges_url: format!("{base_url}/v1/charges"),
            authorization,
            settings: Settings::default(),
        })
    }

    /// The same client with other limits.
    #[must_use]
    pub fn with_settings(self, settings: Settings) -> Self {
        Self { settings, ..self }
    }

    /// Asks until there is an outcome, or the deadline has come. May be called
    /// again with the same operation as often as wanted; it is charged once.
    ///
    /// A charge that is [`Status::Pending`] is a success of this call and not
    /// yet of the payment: send the operation again later.
    ///
    /// # Errors
    /// A [`Failure`], which tells what is certainly not charged from what has to
    /// be asked again.
    pub async fn send(&self, operation: &Operation) -> Result<Charged, Failure> {
        let started = Instant::now();
        let left = || self.settings.deadline.saturating_sub(started.elapsed());
        let mut steps = ExponentialBuilder::new()
            .with_min_delay(STEP_MIN)
            .with_max_delay(STEP_MAX)
            .without_max_times()
            .build();
        loop {
            // Before the first byte: a future that is dropped leaves its doubt.
            operation.doubt();
            let miss = match self.attempt(operation, left()).await {
                Attempt::Settled(outcome) => return outcome,
                Attempt::Missed(miss) => miss,
            };
            if miss.last.is_harmless() {
                operation.clear_doubt();
            }
            let step = steps.next().unwrap_or(STEP_MAX);
            let wait = miss.retry_after.saturating_add(jittered(step));
            if !miss.again || wait.saturating_add(ATTEMPT_MIN) >= left() {
                return Err(operation.failure(miss.last));
            }
            debug!(last = %miss.last, wait_ms = wait.as_millis(), "asking again");
            tokio::time::sleep(wait).await;
        }
    }

    async fn attempt(&self, operation: &Operation, left: Duration) -> Attempt {
        let response = self
            .http
            .post(&self.charges_url)
            .timeout(self.settings.attempt_timeout.min(left))
            .header(AUTHORIZATION, self.authorization.clone())
            .header(CONTENT_TYPE, "application/json")
            .header("idempotency-key", operation.key_header())
            .body(operation.body())
            .send()
            .await;
        let mut response = match response {
            Ok(response) => response,
            Err(error) => return Attempt::unanswered(&error),
        };
        match read(&mut response).await {
            // What its headers say is not relied on: a decline that breaks off
            // says "do not retry", and yet the outcome is not here.
            Err(error) => Attempt::unanswered(&error),
            Ok(body) => judge(
                response.status().as_u16(),
                response.headers(),
                body.as_deref(),
            ),
        }
    }
}

impl Attempt {
    fn unanswered(error: &reqwest::Error) -> Self {
        // A connection that takes too long is first of all none.
        let last = if error.is_connect() {
            Last::NotReached(cause(error))
        } else if error.is_timeout() {
            Last::TimedOut
        } else {
            Last::Broken(cause(error))
        };
        Self::Missed(Miss {
            last,
            again: true,
            retry_after: Duration::ZERO,
        })
    }
}

/// The whole body; `None` if it is larger than any of the service's.
async fn read(response: &mut Response) -> Result<Option<Vec<u8>>, reqwest::Error> {
    let mut body = Vec::new();
    while let Some(chunk) = response.chunk().await? {
        if body.len() + chunk.len() > ANSWER_MAX {
            return Ok(None);
        }
        body.extend_from_slice(&chunk);
    }
    Ok(Some(body))
}

/// What a whole answer means.
fn judge(status: u16, headers: &HeaderMap, body: Option<&[u8]>) -> Attempt {
    let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
    let should_retry = match text("stripe-should-retry") {
        Some("true") => Some(true),
        Some("false") => Some(false),
        _ => None,
    };
    let replayed = text("idempotent-replayed") == Some("true");
    let request_id = text("request-id").and_then(|id| id.parse().ok());
    let body = body.and_then(|body| std::str::from_utf8(body).ok());

    let mut again = should_retry.unwrap_or(matches!(status, 409 | 429 | 500..));
    let last = if (200..300).contains(&status) {
        if let Some(charge) = body.and_then(|body| serde_json::from_str(body).ok()) {
            return Attempt::Settled(Ok(Charged {
                charge,
                replayed,
                request_id,
                body: body.unwrap_or_default().to_owned(),
            }));
        }
        again = should_retry.unwrap_or(true);
        Last::NotUnderstood { status }
    } else {
        let problem = body
            .and_then(|body| serde_json::from_str::<Problem>(body).ok())
            // Else it is the word of somebody in between.
            .filter(|problem| problem.status == status);
        match problem {
            None => Last::NotUnderstood { status },
            Some(problem) => {
                let same_key = problem.retry.same_key;
                match (status, problem.decline(replayed, request_id)) {
                    (402, Some(decline)) => {
                        return Attempt::Settled(Err(Failure::Declined(Box::new(decline))));
                    }
                    (402, None) => Last::NotUnderstood { status },
                    _ => {
                        let refusal = problem.refusal(request_id);
                        if status == 422 && refusal.code == "idempotency_key_reused" {
                            return Attempt::Settled(Err(Failure::KeyReused(Box::new(refusal))));
                        }
                        if (400..500).contains(&status) && !same_key {
                            Last::Refused(Box::new(refusal))
                        } else {
                            Last::Unavailable(Box::new(refusal))
                        }
                    }
                }
            }
        }
    };
    let retry_after = headers.get(RETRY_AFTER).map_or(Duration::ZERO, seconds);
    Attempt::Missed(Miss {
        last,
        again,
        retry_after,
    })
}

/// `Retry-After` in seconds. Its other form, a date, is not the service's, and
/// would need the clocks of both to agree: it counts as none.
fn seconds(value: &HeaderValue) -> Duration {
    let digits = value.as_bytes().trim_ascii();
    if digits.is_empty() || !digits.iter().all(u8::is_ascii_digit) {
        return Duration::ZERO;
    }
    let seconds = std::str::from_utf8(digits)
        .ok()
        .and_then(|d| d.parse().ok());
    // More than fits is longer than any deadline.
    Duration::from_secs(seconds.unwrap_or(u64::MAX))
}

/// Full jitter: anything from nothing to the whole step.
fn jittered(step: Duration) -> Duration {
    step.mul_f64(rand::rng().random_range(0.0..=1.0))
}

/// As [`Client::new`] wants it, without the slash at its end.
fn check_base_url(text: &str) -> Result<&str, ClientError> {
    let url = reqwest::Url::parse(text).map_err(|_| ClientError::BaseUrl)?;
    let usable = matches!(url.scheme(), "http" | "https")
        && url.has_host()
        && url.username().is_empty()
        && url.password().is_none()
        && url.query().is_none()
        && url.fragment().is_none();
    usable
        .then(|| text.trim_end_matches('/'))
        .ok_or(ClientError::BaseUrl)
}

/// The innermost cause; what stands around it holds the URL.
fn cause(error: &reqwest::Error) -> String {
    let mut cause: &dyn std::error::Error = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_jitter_is_full() {
        let step = Duration::from_secs(8);
        let waits: Vec<_> = (0..1000).map(|_| jittered(step)).collect();
        assert!(waits.iter().all(|wait| *wait <= step));
        // Each fails once in 10^46 runs.
        assert!(waits.iter().any(|wait| *wait < step / 10));
        assert!(waits.iter().any(|wait| *wait > step / 10 * 9));
    }

    #[test]
    fn retry_after_is_seconds_or_nothing() {
        let of = |text| seconds(&HeaderValue::from_static(text));
        assert_eq!(of("3"), Duration::from_secs(3));
        assert_eq!(of("99999999999999999999999"), Duration::from_secs(u64::MAX));
        for none in ["", "-1", "+1", "1.5", "Wed, 21 Oct 2026 07:28:00 GMT"] {
            assert_eq!(of(none), Duration::ZERO, "{none:?}");
        }
    }

    #[test]
    fn a_base_url_names_a_service_and_nothing_else() {
        assert_eq!(check_base_url("http://h:1/"), Ok("http://h:1"));
        assert_eq!(check_base_url("https://h/pay"), Ok("https://h/pay"));
        for wrong in [
            "",
            "h:1",
            "ftp://h",
            "http://u@h",
            "http://u:p@h",
            "http://h?q",
            "http://h#f",
        ] {
            assert_eq!(
                check_base_url(wrong),
                Err(ClientError::BaseUrl),
                "{wrong:?}"
            );
        }
    }
}
