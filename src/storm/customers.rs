//! Customers who each want to pay once, and the clients that they use.

use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use axum::body::Bytes;
use indicatif::ProgressBar;
use rand::RngExt;
use serde_json::json;
use tokio::{sync::Semaphore, task::JoinSet};

use super::{
    Options,
    proxy::Routing,
    script::{Dice, Fate, Script},
};
use crate::{cli::Failure, storm::ledger::Ledger};

/// The pauses of Stripe's SDKs, a twentieth as long, so that a storm of
/// thousands does not take hours: they double from here to there, with jitter.
const PAUSE_MIN: Duration = Duration::from_millis(25);
const PAUSE_MAX: Duration = Duration::from_millis(400);

/// How the asking ended for one wish.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// 200 or 402.
    Answered,
    /// 422.
    Reused,
    /// Refused for good in another way.
    Refused,
    /// The patience was over.
    GaveUp,
}

/// What the customers lived through.
#[derive(Debug, Default)]
pub struct Results {
    /// How many came.
    pub customers: u32,
    /// Whether there were to be more.
    pub cut_short: bool,
    /// Requests sent, by [`Fate::ALL`].
    pub fates: [u64; Fate::ALL.len()],
    /// Of requests that were answered, in milliseconds.
    pub latencies_ms: Vec<f64>,
    pub took: Duration,
    /// By the ledger's clock; what comes later is the audit.
    pub closed_at: Duration,
}

/// All that the customers share.
#[derive(Debug)]
pub struct Shop {
    pub dice: Dice,
    pub mark: String,
    customers: u32,
    concurrency: u32,
    pub patience: Duration,
    proxy: SocketAddr,
    http: reqwest::Client,
    pub ledger: Arc<Ledger>,
    fates: [AtomicU64; Fate::ALL.len()],
    latencies_ms: Mutex<Vec<f64>>,
}

impl Shop {
    pub fn new(
        options: &Options,
        seed: u64,
        mark: &str,
        proxy: SocketAddr,
        ledger: Arc<Ledger>,
    ) -> Result<Self, Failure> {
        Ok(Self {
            dice: Dice::new(seed, options.weather),
            mark: mark.to_owned(),
            customers: options.customers,
            concurrency: options.concurrency,
            patience: options.patience,
            proxy,
            http: reqwest::Client::builder().no_proxy().build()?,
            ledger,
            fates: Default::default(),
            latencies_ms: Mutex::default(),
        })
    }

    /// The customer's name, as its charges carry it.
    pub fn customer_id(&self, customer: u32) -> String {
        format!("cus_storm_{}_{customer}", self.mark)
    }

    /// The key under which the customer pays.
    pub fn key(&self, customer: u32) -> String {
        format!("storm-{}-{customer}", self.mark)
    }

    /// What the customer wants: cart 0 is the first one, 1 the changed one.
    pub fn body(&self, customer: u32, cart: u8) -> Bytes {
        let script = self.dice.customer(customer);
        let source = if script.declines {
            "tok_chargeDeclined"
        } else {
            "tok_visa"
        };
        let body = json!({
            "amount": script.amount + i64::from(cart),
            "currency": "usd",
            "customer": self.customer_id(customer),
            "source": source,
        });
        body.to_string().into()
    }

    /// Lets all customers in, so many at a time, and comes back when the last
    /// one has left, or when it is interrupted: then nobody more comes in, and
    /// those inside are turned out in the middle of what they do.
    pub async fn open(
        self: &Arc<Self>,
        progress: &ProgressBar,
        interrupt: impl Future<Output = ()>,
    ) -> Results {
        let started = Instant::now();
        let came = AtomicU32::new(0);
        let cut_short = tokio::select! {
            () = self.let_all_in(progress, &came) => false,
            () = interrupt => true,
        };
        Results {
            customers: came.into_inner(),
            cut_short,
            fates: std::array::from_fn(|i| self.fates[i].load(Ordering::Relaxed)),
            latencies_ms: std::mem::take(
                &mut *self
                    .latencies_ms
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner),
            ),
            took: started.elapsed(),
            closed_at: self.ledger.now(),
        }
    }

    async fn let_all_in(self: &Arc<Self>, progress: &ProgressBar, came: &AtomicU32) {
        let door = Arc::new(Semaphore::new(self.concurrency as usize));
        // Dropped in the middle, it ends all that are inside.
        let mut inside = JoinSet::new();
        for customer in 0..self.customers {
            // The door is never closed.
            let Ok(permit) = Arc::clone(&door).acquire_owned().await else {
                break;
            };
            came.fetch_add(1, Ordering::Relaxed);
            let shop = Arc::clone(self);
            let progress = progress.clone();
            inside.spawn(async move {
                shop.serve(customer).await;
                progress.inc(1);
                drop(permit);
            });
            while inside.try_join_next().is_some() {}
        }
        while inside.join_next().await.is_some() {}
    }

    async fn serve(&self, customer: u32) {
        let Script {
            double_clicks,
            changes_cart,
            comes_back,
            ..
        } = self.dice.customer(customer);
        if changes_cart {
            // The first try, and no answer that is waited for.
            self.ask_once(customer, 0, 0, 0).await;
        }
        let cart = u8::from(changes_cart);
        let ended = if double_clicks {
            let (first, second) =
                tokio::join!(self.ask(customer, 1, cart), self.ask(customer, 2, cart));
            if first == Ended::Answered {
                first
            } else {
                second
            }
        } else {
            self.ask(customer, 1, cart).await
        };
        if ended == Ended::Reused {
            // The key was used with the first cart: that is what was bought.
            self.ask(customer, 3, 0).await;
        } else if comes_back {
            let pause = Duration::from_millis(rand::rng().random_range(50..500));
            tokio::time::sleep(pause).await;
            self.ask(customer, 4, cart).await;
        }
    }

    /// Asks until there is an answer.
    async fn ask(&self, customer: u32, session: u16, cart: u8) -> Ended {
        let give_up = Instant::now() + self.patience;
        let mut pause = PAUSE_MIN;
        for attempt in 0.. {
            if let Some(ended) = self.ask_once(customer, session, attempt, cart).await {
                return ended;
            }
            let jittered = pause.mul_f64(rand::rng().random_range(0.5..1.0));
            if Instant::now() + jittered >= give_up {
                break;
            }
            tokio::time::sleep(jittered).await;
            pause = (pause * 2).min(PAUSE_MAX);
        }
        Ended::GaveUp
    }

    /// One request; `None` if it has to be asked again.
    async fn ask_once(&self, customer: u32, session: u16, attempt: u16, cart: u8) -> Option<Ended> {
        let course = self.dice.request(customer, session, attempt);
        let replica = customer as usize
            + usize::from(session)
            + if course.switches {
                usize::from(attempt)
            } else {
                0
            };
        let routing = Routing {
            customer,
            cart,
            replica,
            fate: course.fate,
            delay_ms: course.delay_ms,
        };
        if let Some(at) = Fate::ALL.iter().position(|&fate| fate == course.fate) {
            self.fates[at].fetch_add(1, Ordering::Relaxed);
        }
        let (name, value) = routing.header();
        let sent = Instant::now();
        let response = self
            .http
            .post(format!("http://{}/v1/charges", self.proxy))
            .header(name, value)
            .header("idempotency-key", self.key(customer))
            .body(self.body(customer, cart))
            .send()
            .await
            .ok()?;
        let (status, should_retry) = (
            response.status().as_u16(),
            response
                .headers()
                .get("stripe-should-retry")
                .map(|value| value == "true"),
        );
        response.bytes().await.ok()?;
        let latency_ms = sent.elapsed().as_secs_f64() * 1000.0;
        self.latencies_ms
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(latency_ms);
        match status {
            200 | 402 => Some(Ended::Answered),
            422 => Some(Ended::Reused),
            // As Stripe's SDKs decide it.
            _ if should_retry.unwrap_or(status == 409 || status >= 500) => None,
            _ => Some(Ended::Refused),
        }
    }
}
