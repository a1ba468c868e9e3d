//! Who asks: from an API key to an account.
//!
//! Look-ups have connections of their own ([`CONNECTIONS`]), so that a charge never
//! waits behind lists. Keys that were valid here before and keys that nobody here
//! has seen have a queue each, so that strangers do not keep customers waiting. After
//! a start every customer is a stranger, so the queues are long enough for the first
//! requests of all of them. What strangers can cost is bounded otherwise: an unknown key
//! is remembered for a moment, and an address that sends many of them is refused for a
//! moment.

use std::{
    net::{IpAddr, Ipv6Addr},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use axum::{
    extract::FromRequestParts,
    http::{HeaderMap, header, request::Parts},
};
use base64::{Engine, engine::general_purpose::STANDARD};
use moka::future::Cache;
use sqlx::PgPool;
use tokio::time::Instant;

use super::{App, admission::Admission, request_context::RequestContext};
use crate::{
    accounts::{self, ApiKey, SecretHash},
    db,
    error::Error,
    ids::AccountId,
};

/// How many connections look-ups of API keys have. Keys that were valid here before
/// use [`CONNECTIONS_EACH`] of them at most, and so do others: one is always left to
/// either, and either may have the third while the other does not need it.
pub const CONNECTIONS: u32 = 3;

const CONNECTIONS_EACH: u32 = CONNECTIONS - 1;

/// How many look-ups of either kind may wait: one for each connection that is served
/// by default (`CONNECTIONS_MAX`). A look-up takes less than a millisecond, so that all
/// of them have their turn within a second or so.
const WAITING_MAX: usize = 4096;

/// How many accounts are remembered, and as many unknown keys and addresses; each
/// takes about 150 bytes.
const REMEMBERED_MAX: u64 = 10_000;

/// How many keys that were valid are told from those that never were, and for how
/// long after their last use.
const CUSTOMERS_MAX: u64 = 50_000;
const CUSTOMER_FOR: Duration = Duration::from_hours(24);

/// Somebody who is known.
#[derive(Debug, Clone, Copy)]
pub struct Caller {
    /// On whose behalf.
    pub account_id: AccountId,
}

/// The address that a request came from, as the accept loop sees it: behind a proxy
/// it is the proxy's.
#[derive(Debug, Clone, Copy)]
pub struct Peer(pub IpAddr);

/// How callers are remembered and limited.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// How long an account is remembered. A look-up takes a second at most
    /// ([`db::READ_TIMEOUT`]), so with four seconds a revoked key is dead within
    /// five.
    pub remembered: Duration,
    /// How long it is remembered that a key is unknown. A key that was just made
    /// works at once nevertheless: nobody can have asked for it before.
    pub unknown_remembered: Duration,
    /// How many unknown keys an address may send in a moment
    /// ([`failures_window`](Self::failures_window)); 0 is no limit.
    pub failures_max: u32,
    /// How long that moment is, from the first of them on.
    pub failures_window: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            remembered: Duration::from_secs(4),
            unknown_remembered: Duration::from_secs(1),
            failures_max: 50,
            failures_window: Duration::from_secs(1),
        }
    }
}

/// Finds out whose an API key is, and remembers it for a few seconds, so that a
/// busy key costs no query per request. Requests that ask for the same key at
/// the same time share one query. Clones share what they remember.
#[derive(Debug, Clone)]
pub struct Callers {
    pool: PgPool,
    options: Options,
    customers: Admission,
    strangers: Admission,
    remembered: Cache<SecretHash, AccountId>,
    /// Keys that were valid when they were last looked up.
    valid_before: Cache<SecretHash, ()>,
    unknown: Cache<SecretHash, ()>,
    /// How many unknown keys an address sent within its window.
    failures: Cache<IpAddr, Arc<AtomicU32>>,
}

/// Why a look-up gives no account.
#[derive(Debug)]
enum NoAccount {
    Unknown,
    /// Too many wait for a look-up.
    NotAdmitted(Error),
    Database(Arc<sqlx::Error>),
}

impl Callers {
    /// Looks keys up in `pool`, which is for this alone and has [`CONNECTIONS`].
    #[must_use]
    pub fn new(pool: PgPool, options: Options) -> Self {
        Self {
            pool,
            options,
            customers: Admission::with_places(CONNECTIONS_EACH, WAITING_MAX),
            strangers: Admission::with_places(CONNECTIONS_EACH, WAITING_MAX),
            remembered: short_lived(options.remembered),
            valid_before: Cache::builder()
                .max_capacity(CUSTOMERS_MAX)
                .time_to_idle(CUSTOMER_FOR)
                .build(),
            unknown: short_lived(options.unknown_remembered),
            failures: short_lived(options.failures_window),
        }
    }

    /// The same with nothing remembered.
    #[must_use]
    pub fn cold(&self) -> Self {
        Self::new(self.pool.clone(), self.options)
    }

    /// Forgets which accounts keys belong to: each is looked up again when it is next
    /// used.
    pub fn forget_accounts(&self) {
        self.remembered.invalidate_all();
    }

    /// Each request asks on its own clock; what they share is an attempt.
    async fn identify(
        &self,
        key: &ApiKey,
        peer: Option<Peer>,
        deadline: Instant,
    ) -> Result<AccountId, Error> {
        let hash = key.hash();
        if let Some(account_id) = self.remembered.get(&hash).await {
            return Ok(account_id);
        }
        if self.unknown.contains_key(&hash) {
            return Err(Error::ApiKeyInvalid);
        }
        let address = peer.map(Peer::limited_by);
        let valid_before = self.valid_before.contains_key(&hash);
        if !valid_before {
            self.refuse_after_failures(address).await?;
        }
        let queue = if valid_before {
            &self.customers
        } else {
            &self.strangers
        };
        let look_up = || async {
            // An attempt ends before, on the clock of whoever makes it.
            let end = Instant::now() + 2 * db::READ_TIMEOUT;
            let _turn = queue.turn(end).await.map_err(NoAccount::NotAdmitted)?;
            match accounts::authenticate(&self.pool, hash).await {
                Ok(account_id) => account_id.ok_or(NoAccount::Unknown),
                Err(error) => Err(NoAccount::Database(Arc::new(error))),
            }
        };
        let attempt = || async {
            match self.remembered.try_get_with(hash, look_up()).await {
                Ok(account_id) => Ok(Ok(account_id)),
                Err(why) => match &*why {
                    NoAccount::Unknown => Ok(Err(Error::ApiKeyInvalid)),
                    NoAccount::NotAdmitted(error) => Ok(Err(error.clone())),
                    NoAccount::Database(error) => Err(Arc::clone(error)),
                },
            }
        };
        let found = db::read(deadline, attempt).await?;
        match found {
            Ok(_) => self.valid_before.insert(hash, ()).await,
            Err(Error::ApiKeyInvalid) => {
                self.valid_before.invalidate(&hash).await;
                self.unknown.insert(hash, ()).await;
                self.count_failure(address).await;
            }
            Err(_) => {}
        }
        found
    }

    /// Not for keys that were valid before: an address that is refused can be a proxy,
    /// with customers behind it.
    async fn refuse_after_failures(&self, address: Option<IpAddr>) -> Result<(), Error> {
        let (Some(address), 1..) = (address, self.options.failures_max) else {
            return Ok(());
        };
        let failures = self.failures.get(&address).await;
        if failures.is_some_and(|n| n.load(Ordering::Relaxed) >= self.options.failures_max) {
            let window = self.options.failures_window;
            return Err(Error::RateLimited {
                retry_after: window.as_secs().max(1),
            });
        }
        Ok(())
    }

    async fn count_failure(&self, address: Option<IpAddr>) {
        if let Some(address) = address {
            let failures = self.failures.get_with(address, async { Arc::default() });
            failures.await.fetch_add(1, Ordering::Relaxed);
        }
    }
}

fn short_lived<K, V>(time_to_live: Duration) -> Cache<K, V>
where
    K: std::hash::Hash + Eq + Send + Sync + 'static,
    V: Clone + Send + Sync + 'static,
{
    Cache::builder()
        .max_capacity(REMEMBERED_MAX)
        .time_to_live(time_to_live)
        .build()
}

impl Peer {
    /// What is counted as one address: of IPv6 a /64, which is what one customer of a
    /// provider has.
    fn limited_by(self) -> IpAddr {
        match self.0.to_canonical() {
            IpAddr::V6(address) => {
                let network = address.to_bits() & (u128::MAX << 64);
                Ipv6Addr::from_bits(network).into()
            }
            v4 @ IpAddr::V4(_) => v4,
        }
    }
}

impl Caller {
    /// Who asks, without counting the request.
    ///
    /// # Errors
    /// [`Error::ApiKeyInvalid`], [`Error::RateLimited`] if too many unknown keys came
    /// from the same address, [`Error::Unavailable`].
    pub async fn identify(parts: &mut Parts, app: &App) -> Result<Self, Error> {
        let Ok(RequestContext { deadline, .. }) =
            RequestContext::from_request_parts(parts, app).await;
        let key = api_key(&parts.headers).ok_or(Error::ApiKeyInvalid)?;
        let peer = parts.extensions.get().copied();
        let account_id = app.callers.identify(&key, peer, deadline).await?;
        Ok(Self { account_id })
    }
}

impl FromRequestParts<App> for Caller {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, Error> {
        let caller = Self::identify(parts, app).await?;
        // Before anything is read of the request or claimed for it.
        app.limits.count(caller.account_id)?;
        Ok(caller)
    }
}

/// From `Bearer KEY`, or from the user name of `Basic` with any password, as
/// `curl -u KEY:` sends it.
fn api_key(headers: &HeaderMap) -> Option<ApiKey> {
    let mut values = headers.get_all(header::AUTHORIZATION).iter();
    let (Some(value), None) = (values.next(), values.next()) else {
        return None;
    };
    let (scheme, credentials) = value.to_str().ok()?.trim().split_once(' ')?;
    if scheme.eq_ignore_ascii_case("bearer") {
        return credentials.trim().parse().ok();
    }
    if !scheme.eq_ignore_ascii_case("basic") {
        return None;
    }
    let decoded = String::from_utf8(STANDARD.decode(credentials.trim()).ok()?).ok()?;
    decoded
        .split_once(':')
        .map_or(decoded.as_str(), |(user, _)| user)
        .parse()
        .ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bearer_and_basic_name_the_same_key() {
        let key = ApiKey::generate();
        let of = |value: String| {
            let headers = HeaderMap::from_iter([(header::AUTHORIZATION, value.parse().unwrap())]);
            api_key(&headers).map(|key| key.hash())
        };
        let secret = key.reveal();
        assert_eq!(of(format!("Bearer {secret}")), Some(key.hash()));
        assert_eq!(of(format!("bearer  {secret}")), Some(key.hash()));
        assert_eq!(
            of(format!("Basic {}", STANDARD.encode(format!("{secret}:")))),
            Some(key.hash())
        );
        assert_eq!(
            of(format!("Basic {}", STANDARD.encode(secret))),
            Some(key.hash())
        );
        for wrong in [
            secret.to_owned(),
            format!("Digest {secret}"),
            "Basic ???".to_owned(),
            "Bearer".to_owned(),
        ] {
            assert_eq!(of(wrong), None);
        }
    }
}
