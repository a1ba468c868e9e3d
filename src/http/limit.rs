//! How many requests an account may make.

use std::{num::NonZeroU32, sync::Arc};

use governor::{DefaultKeyedRateLimiter, Quota, RateLimiter, clock::Clock};

use crate::{error::Error, ids::AccountId};

/// Counts the requests of each account, in this process. Clones count together.
#[derive(Clone, Default)]
pub struct Limits(Option<Arc<DefaultKeyedRateLimiter<AccountId>>>);

impl Limits {
    /// So many a second, and as many at once; 0 is no limit.
    #[must_use]
    pub fn per_second(requests: u32) -> Self {
        let quota = NonZeroU32::new(requests).map(Quota::per_second);
        Self(quota.map(|quota| Arc::new(RateLimiter::keyed(quota))))
    }

    /// Counts a request.
    ///
    /// # Errors
    /// [`Error::RateLimited`], with the pause after which the next one is let
    /// through.
    pub fn count(&self, account_id: AccountId) -> Result<(), Error> {
        let Some(limiter) = &self.0 else {
            return Ok(());
        };
        limiter.check_key(&account_id).map_err(|until| {
            let pause = until.wait_time_from(limiter.clock().now());
            Error::RateLimited {
                retry_after: pause.as_secs() + u64::from(pause.subsec_nanos() > 0),
            }
        })
    }

    /// Forgets the accounts that have been quiet.
    pub fn evict_idle(&self) {
        if let Some(limiter) = &self.0 {
            limiter.retain_recent();
        }
    }
}

impl std::fmt::Debug for Limits {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "Limits({})",
            if self.0.is_some() { "some" } else { "none" }
        )
    }
}
