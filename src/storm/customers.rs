//! Customers who each want to pay once, and the clients that they use. Some
//! capture what they authorised, some want their money back.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use axum::body::Bytes;
use indicatif::ProgressBar;
use rand::RngExt;
use serde_json::{Value, json};
use tokio::{sync::Semaphore, task::JoinSet};

use super::{
    Options,
    ledger::{Answer, KeyId, Ledger, Said},
    proxy::Routing,
    script::{Dice, Draft, Fate, Habits, Kind, Plan, Share, Step},
};
use crate::cli::Failure;

/// The pauses of Stripe's SDKs, a twentieth as long, so that a storm of
/// thousands does not take hours: they double from here to there, with jitter.
const PAUSE_MIN: Duration = Duration::from_millis(25);
const PAUSE_MAX: Duration = Duration::from_millis(400);

/// A customer comes with one key less often than this.
const SESSIONS_MAX: u16 = 8;

/// How the asking ended for one operation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ended {
    /// With an outcome.
    Answered(Answer),
    /// 422.
    Reused,
    /// Refused for good in another way.
    Refused,
    /// The patience was over.
    GaveUp,
}

/// What is asked for under one key.
#[derive(Debug, Clone)]
pub struct Keyed {
    pub id: KeyId,
    pub kind: Kind,
    pub key: String,
    pub path: String,
    /// The first request, and the changed one: cart 0 and cart 1.
    pub bodies: [Bytes; 2],
    /// What they say of the amount, if anything.
    pub amounts: [Option<i64>; 2],
}

/// What a customer has begun to change, and of which charge.
#[derive(Debug, Clone)]
pub struct Begun {
    pub charge_id: String,
    /// Of the charge.
    pub amount: i64,
    /// Whether the charge took no money yet.
    pub authorised: bool,
    pub changes: Vec<Keyed>,
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
    /// Whether answers expire while the storm blows.
    pub answers_expire: bool,
    begun: Mutex<BTreeMap<u32, Begun>>,
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
            dice: Dice::new(seed, options.weather, options.changes),
            mark: mark.to_owned(),
            customers: options.customers,
            concurrency: options.concurrency,
            patience: options.patience,
            proxy,
            http: reqwest::Client::builder().no_proxy().build()?,
            ledger,
            answers_expire: options.answers_expire,
            begun: Mutex::default(),
            fates: Default::default(),
            latencies_ms: Mutex::default(),
        })
    }

    /// The customer's name, as its charges carry it.
    pub fn customer_id(&self, customer: u32) -> String {
        format!("cus_storm_{}_{customer}", self.mark)
    }

    /// What the customer pays, and under which key.
    pub fn charge(&self, customer: u32) -> Keyed {
        let script = self.dice.customer(customer);
        let source = if script.declines {
            "tok_chargeDeclined"
        } else {
            "tok_visa"
        };
        let amounts = [script.amount, script.amount + 1];
        let authorises = self.dice.plan(customer).is_some_and(|plan| plan.authorises);
        let bodies = amounts.map(|amount| {
            let mut body = json!({
                "amount": amount,
                "currency": "usd",
                "customer": self.customer_id(customer),
                "source": source,
            });
            if authorises {
                body["capture"] = json!(false);
            }
            body.to_string().into()
        });
        Keyed {
            id: KeyId::charge(customer),
            kind: Kind::Charge,
            key: format!("storm-{}-{customer}", self.mark),
            path: "/v1/charges".to_owned(),
            bodies,
            amounts: amounts.map(Some),
        }
    }

    /// What the customer has begun to change.
    pub fn begun(&self, customer: u32) -> Option<Begun> {
        self.all_begun().get(&customer).cloned()
    }

    fn all_begun(&self) -> MutexGuard<'_, BTreeMap<u32, Begun>> {
        self.begun.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What of an answer has to be the same each time it is given.
    pub fn compared(&self, kind: Kind, answer: Answer) -> Answer {
        if self.answers_expire {
            answer.lasting(kind)
        } else {
            answer
        }
    }

    /// A customer's key by its name in reports: that of a charge is its customer.
    pub fn name(&self, id: KeyId) -> String {
        match id.number {
            0 => self.customer_id(id.customer),
            number => self
                .begun(id.customer)
                .and_then(|begun| Some(begun.changes.get(usize::from(number) - 1)?.key.clone()))
                .unwrap_or_else(|| self.customer_id(id.customer)),
        }
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
        let mut inside = JoinSet::new();
        let cut_short = tokio::select! {
            () = self.let_all_in(&mut inside, progress, &came) => false,
            () = interrupt => true,
        };
        // And waits for it: nobody begins anything while the audit reads what was
        // begun.
        inside.shutdown().await;
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

    async fn let_all_in(
        self: &Arc<Self>,
        inside: &mut JoinSet<()>,
        progress: &ProgressBar,
        came: &AtomicU32,
    ) {
        let door = Arc::new(Semaphore::new(self.concurrency as usize));
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
        let charge = self.charge(customer);
        let habits = self.dice.customer(customer).habits;
        let answer = self.insist(&charge, habits).await;
        let Some(plan) = self.dice.plan(customer) else {
            return;
        };
        let charge: Option<Value> = answer
            .filter(|answer| answer.status == 200)
            .and_then(|answer| serde_json::from_str(&answer.body).ok());
        if let Some(charge) = charge {
            self.change(customer, plan, &charge).await;
        }
    }

    /// Captures and refunds as planned, as long as there are answers: before the
    /// outcome of a step is known nobody takes the next.
    async fn change(&self, customer: u32, plan: Plan, charge: &Value) {
        let (Some(id), Some(amount)) = (charge["id"].as_str(), charge["amount"].as_i64()) else {
            return;
        };
        let begun = Begun {
            charge_id: id.to_owned(),
            amount,
            authorised: plan.authorises,
            changes: vec![],
        };
        self.all_begun().insert(customer, begun);
        // What shares are taken of: the amount, and what was captured of it.
        let mut whole = amount;
        for step in plan.steps {
            let start = |draft| self.begin(customer, draft, whole);
            let insist = async |change: &Keyed| {
                let habits = self.dice.habits(customer, change.id.number);
                self.insist(change, habits).await
            };
            let answers = match step {
                Step::One(draft) => vec![insist(&start(draft)).await],
                Step::AtOnce(one, other) => {
                    let (one, other) = (start(one), start(other));
                    let (one, other) = tokio::join!(insist(&one), insist(&other));
                    vec![one, other]
                }
            };
            for answer in answers {
                let Some(answer) = answer else { return };
                let body: Value = serde_json::from_str(&answer.body).unwrap_or_default();
                if let Some(captured) = body["amount_captured"].as_i64() {
                    whole = captured;
                }
            }
        }
    }

    /// Notes what is about to be asked for.
    fn begin(&self, customer: u32, Draft { kind, share }: Draft, whole: i64) -> Keyed {
        let mut all = self.all_begun();
        let begun = all.get_mut(&customer).expect("noted when it began");
        let number = u8::try_from(begun.changes.len() + 1).expect("plans are short");
        let amounts = match share {
            Share::All => [None, None],
            Share::Thousandths(share) => {
                let amount = (whole * share / 1000).max(1);
                [Some(amount), Some(amount + 1)]
            }
        };
        let key = format!("storm-{}-{customer}-{}-{number}", self.mark, kind.name());
        let path = match kind {
            Kind::Capture => format!("/v1/charges/{}/capture", begun.charge_id),
            Kind::Charge | Kind::Refund => "/v1/refunds".to_owned(),
        };
        let bodies = amounts.map(|amount| {
            let mut body = json!({});
            if let Some(amount) = amount {
                body["amount"] = json!(amount);
            }
            if kind == Kind::Refund {
                body["charge"] = json!(begun.charge_id);
                // By which the audit knows it again.
                body["metadata"] = json!({ "storm_key": key });
            }
            body.to_string().into()
        });
        let change = Keyed {
            id: KeyId { customer, number },
            kind,
            key,
            path,
            bodies,
            amounts,
        };
        begun.changes.push(change.clone());
        change
    }

    /// One customer's whole way with one key. `None` if it ends without an outcome.
    async fn insist(&self, keyed: &Keyed, habits: Habits) -> Option<Answer> {
        // A request that names no amount has no other to change to.
        let changes_amount = habits.changes_amount && keyed.bodies[0] != keyed.bodies[1];
        if changes_amount {
            // The first try, and no answer that is waited for.
            self.ask_once(keyed, 0, 0, 0).await;
        }
        let cart = u8::from(changes_amount);
        let mut ended = if habits.double_clicks {
            let (first, second) = tokio::join!(self.ask(keyed, 1, cart), self.ask(keyed, 2, cart));
            if matches!(first, Ended::Answered(_)) {
                first
            } else {
                second
            }
        } else {
            self.ask(keyed, 1, cart).await
        };
        if ended == Ended::Reused {
            // The key was used with the first cart: that is what was bought.
            ended = self.ask(keyed, 3, 0).await;
        } else if habits.comes_back {
            let pause = Duration::from_millis(rand::rng().random_range(50..500));
            tokio::time::sleep(pause).await;
            self.ask(keyed, 4, cart).await;
        }
        match ended {
            Ended::Answered(answer) => Some(answer),
            Ended::Reused | Ended::Refused | Ended::GaveUp => None,
        }
    }

    /// Asks until there is an answer.
    async fn ask(&self, keyed: &Keyed, session: u16, cart: u8) -> Ended {
        let give_up = Instant::now() + self.patience;
        let mut pause = PAUSE_MIN;
        for attempt in 0.. {
            if let Some(ended) = self.ask_once(keyed, session, attempt, cart).await {
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
    async fn ask_once(&self, keyed: &Keyed, session: u16, attempt: u16, cart: u8) -> Option<Ended> {
        let KeyId { customer, number } = keyed.id;
        let drawn = u16::from(number) * SESSIONS_MAX + session;
        let course = self.dice.request(customer, drawn, attempt);
        // Clients who come at once come to different replicas.
        let replica = customer as usize
            + usize::from(number)
            + usize::from(session)
            + if course.switches {
                usize::from(attempt)
            } else {
                0
            };
        let routing = Routing {
            key: keyed.id,
            kind: keyed.kind,
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
            .post(format!("http://{}{}", self.proxy, keyed.path))
            .header(name, value)
            .header("idempotency-key", &keyed.key)
            .body(keyed.bodies[usize::from(cart)].clone())
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
        let body = response.bytes().await.ok()?;
        let latency_ms = sent.elapsed().as_secs_f64() * 1000.0;
        self.latencies_ms
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(latency_ms);
        let body = String::from_utf8_lossy(&body).into();
        match Said::of(keyed.kind, status, &body) {
            Said::Answer(answer) => Some(Ended::Answered(answer)),
            Said::Reused => Some(Ended::Reused),
            // As Stripe's SDKs decide it.
            _ if should_retry.unwrap_or(status == 409 || status >= 500) => None,
            _ => Some(Ended::Refused),
        }
    }
}
