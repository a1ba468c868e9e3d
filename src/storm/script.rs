//! What a seed makes of a customer, and of a request.

use clap::Args;
use rand::{RngExt, SeedableRng, rngs::ChaCha8Rng};
use serde::Serialize;

/// How likely each fault is, per request; what is left over passes untouched.
#[derive(Debug, Clone, Copy, Args)]
pub struct Weather {
    /// A request is held up for up to 200 ms
    #[arg(long, default_value_t = 0.10, value_parser = probability, value_name = "P")]
    delay: f64,
    /// A request does not arrive
    #[arg(long, default_value_t = 0.05, value_parser = probability, value_name = "P")]
    drop: f64,
    /// A request arrives, and its answer is lost
    #[arg(long, default_value_t = 0.10, value_parser = probability, value_name = "P")]
    cut: f64,
    /// A request arrives, and something in between answers 502
    #[arg(long, default_value_t = 0.05, value_parser = probability, value_name = "P")]
    bad_gateway: f64,
    /// A request arrives twice at the same time
    #[arg(long, default_value_t = 0.05, value_parser = probability, value_name = "P")]
    duplicate: f64,
    /// A retry goes to another replica
    #[arg(long, default_value_t = 0.50, value_parser = probability, value_name = "P")]
    switch: f64,
}

/// From a flag.
pub fn probability(text: &str) -> Result<f64, String> {
    text.parse()
        .ok()
        .filter(|p| (0.0..=1.0).contains(p))
        .ok_or_else(|| "a probability is a number from 0 to 1".to_owned())
}

/// What happens to one request on its way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Fate {
    /// Nothing.
    Passed,
    /// It comes late.
    Delayed,
    /// It does not come.
    Dropped,
    /// It comes; the connection is cut once the answer is there.
    AnswerLost,
    /// It comes; the connection is cut at once, on both sides.
    HungUp,
    /// It comes; the client is told 502.
    BadGateway,
    /// It comes twice.
    Duplicated,
}

impl Fate {
    /// All of them, in the order in which they are reported.
    pub const ALL: [Self; 7] = [
        Self::Passed,
        Self::Delayed,
        Self::Dropped,
        Self::AnswerLost,
        Self::HungUp,
        Self::BadGateway,
        Self::Duplicated,
    ];

    /// As it stands in a header and in the report.
    pub fn name(self) -> &'static str {
        match self {
            Self::Passed => "passed",
            Self::Delayed => "delayed",
            Self::Dropped => "dropped",
            Self::AnswerLost => "answer_lost",
            Self::HungUp => "hung_up",
            Self::BadGateway => "bad_gateway",
            Self::Duplicated => "duplicated",
        }
    }
}

/// A request's way, drawn before it is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Course {
    pub fate: Fate,
    pub delay_ms: u64,
    /// Whether it goes to another replica than the one before.
    pub switches: bool,
}

/// What a customer wants and does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Script {
    pub amount: i64,
    pub declines: bool,
    pub habits: Habits,
}

/// What a customer does with its charge once it has one: a number of steps, each
/// when the one before has its answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// Whether the charge only authorises, and the money is taken by a capture.
    pub authorises: bool,
    pub steps: Vec<Step>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    One(Draft),
    /// By two clients at the same time, each under a key of its own.
    AtOnce(Draft, Draft),
}

/// A capture or a refund whose amount is not known yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Draft {
    pub kind: Kind,
    pub share: Share,
}

/// How much of what can be captured, or of what was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Share {
    /// All, which is said by naming no amount.
    All,
    /// So many thousandths. More than 1000 have to be refused.
    Thousandths(i64),
}

/// What a key is used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    Charge,
    Capture,
    Refund,
}

impl Kind {
    pub const ALL: [Self; 3] = [Self::Charge, Self::Capture, Self::Refund];

    /// As it stands in a key, a header and the history.
    pub fn name(self) -> &'static str {
        match self {
            Self::Charge => "charge",
            Self::Capture => "capture",
            Self::Refund => "refund",
        }
    }
}

/// How a customer goes about what it wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Habits {
    /// Submits twice at the same time.
    pub double_clicks: bool,
    /// Wants another amount after the first try, and asks again under the old key.
    pub changes_amount: bool,
    /// Asks again after it has its answer and a pause.
    pub comes_back: bool,
}

/// Everything that is drawn comes from here, each draw from a stream of its
/// own, so that it does not depend on who runs first.
#[derive(Debug, Clone, Copy)]
pub struct Dice {
    seed: u64,
    weather: Weather,
    /// The share of customers who do more than pay.
    changes: f64,
}

impl Dice {
    pub fn new(seed: u64, weather: Weather, changes: f64) -> Self {
        Self {
            seed,
            weather,
            changes,
        }
    }

    fn stream(&self, customer: u32, purpose: u32) -> ChaCha8Rng {
        let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
        rng.set_stream(u64::from(customer) << 32 | u64::from(purpose));
        rng
    }

    pub fn customer(&self, customer: u32) -> Script {
        let mut rng = self.stream(customer, 0);
        Script {
            amount: rng.random_range(100..=100_000),
            declines: rng.random_bool(0.05),
            habits: Habits::draw(&mut rng),
        }
    }

    /// What a customer does beyond paying, if anything.
    pub fn plan(&self, customer: u32) -> Option<Plan> {
        let mut rng = self.stream(customer, PLAN);
        if !rng.random_bool(self.changes) || self.customer(customer).declines {
            return None;
        }
        let draft = |kind, share| Draft { kind, share };
        let capture = |share| draft(Kind::Capture, share);
        let refund = |share| draft(Kind::Refund, share);
        let part = Share::Thousandths(rng.random_range(100..=900));
        let most = Share::Thousandths(600);
        let authorises = rng.random_bool(0.5);
        let mut steps = Vec::new();
        if authorises {
            match rng.random_range(0..5) {
                0 => steps.push(Step::One(capture(Share::All))),
                1 => steps.push(Step::One(capture(part))),
                2 => steps.extend([
                    Step::One(capture(Share::Thousandths(1500))),
                    Step::One(capture(Share::All)),
                ]),
                3 => steps.push(Step::AtOnce(capture(Share::All), capture(part))),
                // Of what is not captured a refund is a cancellation.
                _ => steps.push(Step::AtOnce(capture(part), refund(Share::All))),
            }
        }
        if !authorises || rng.random_bool(0.5) {
            match rng.random_range(0..5) {
                0 => steps.push(Step::One(refund(Share::All))),
                1 => steps.extend([
                    Step::One(refund(Share::Thousandths(300))),
                    Step::AtOnce(
                        refund(Share::Thousandths(200)),
                        refund(Share::Thousandths(200)),
                    ),
                    Step::One(refund(Share::All)),
                ]),
                2 => steps.push(Step::AtOnce(refund(Share::All), refund(Share::All))),
                3 => steps.push(Step::AtOnce(refund(most), refund(most))),
                _ => steps.extend([
                    Step::One(refund(most)),
                    Step::One(refund(most)),
                    Step::One(refund(Share::All)),
                ]),
            }
        }
        Some(Plan { authorises, steps })
    }

    /// How a customer goes about its `number`th change.
    pub fn habits(&self, customer: u32, number: u8) -> Habits {
        Habits::draw(&mut self.stream(customer, PLAN - u32::from(number)))
    }

    /// Of the `attempt`th request of a customer's `session`th operation.
    pub fn request(&self, customer: u32, session: u16, attempt: u16) -> Course {
        let purpose = u32::from(session + 1) << 16 | u32::from(attempt);
        let mut rng = self.stream(customer, purpose);
        let w = &self.weather;
        let mut draw: f64 = rng.random();
        let mut fate = Fate::Passed;
        for (p, candidate) in [
            (w.delay, Fate::Delayed),
            (w.drop, Fate::Dropped),
            (w.cut / 2.0, Fate::AnswerLost),
            (w.cut / 2.0, Fate::HungUp),
            (w.bad_gateway, Fate::BadGateway),
            (w.duplicate, Fate::Duplicated),
        ] {
            if draw < p {
                fate = candidate;
                break;
            }
            draw -= p;
        }
        Course {
            fate,
            delay_ms: rng.random_range(1..=200),
            switches: rng.random_bool(w.switch),
        }
    }
}

/// The stream of a customer's plan; those of its changes' habits come before it.
/// The purposes of requests, [`Dice::request`], are far below.
const PLAN: u32 = u32::MAX;

impl Habits {
    fn draw(rng: &mut ChaCha8Rng) -> Self {
        Self {
            double_clicks: rng.random_bool(0.10),
            changes_amount: rng.random_bool(0.05),
            comes_back: rng.random_bool(0.20),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WEATHER: Weather = Weather {
        delay: 0.1,
        drop: 0.05,
        cut: 0.1,
        bad_gateway: 0.05,
        duplicate: 0.05,
        switch: 0.5,
    };

    #[test]
    fn a_seed_plays_the_same_again_and_another_seed_does_not() {
        let play = |seed| {
            let dice = Dice::new(seed, WEATHER, 0.3);
            let customers: Vec<_> = (0..100)
                .map(|n| (dice.customer(n), dice.plan(n), dice.habits(n, 1)))
                .collect();
            let requests: Vec<_> = (0..100).map(|n| dice.request(n, 0, 3)).collect();
            (customers, requests)
        };
        assert_eq!(play(7), play(7));
        assert_ne!(play(7).0, play(8).0);
        assert_ne!(play(7).1, play(8).1);
    }

    #[test]
    fn faults_come_as_often_as_they_should() {
        let dice = Dice::new(1, WEATHER, 0.3);
        let count = |fate| {
            (0..10_000)
                .filter(|&n| dice.request(n, 0, 0).fate == fate)
                .count()
        };
        assert!((900..1100).contains(&count(Fate::Delayed)));
        assert!((400..600).contains(&count(Fate::HungUp)));
        assert!((6200..6800).contains(&count(Fate::Passed)));
    }
    #[test]
    fn as_many_customers_change_their_charges_as_should_and_in_all_ways() {
        let plans = |changes| {
            let dice = Dice::new(1, WEATHER, changes);
            (0..10_000)
                .filter_map(|n| dice.plan(n))
                .collect::<Vec<Plan>>()
        };
        assert_eq!(plans(0.0), []);
        // All but those whose card is declined.
        assert!((9300..9700).contains(&plans(1.0).len()));
        let plans = plans(0.3);
        assert!((2600..3100).contains(&plans.len()));
        let has = |step: fn(&Step) -> bool| plans.iter().any(|plan| plan.steps.iter().any(step));
        let kinds = |step: &Step| match step {
            Step::One(draft) => vec![draft.kind],
            Step::AtOnce(one, other) => vec![one.kind, other.kind],
        };
        for wanted in [
            vec![Kind::Capture],
            vec![Kind::Refund],
            vec![Kind::Capture, Kind::Capture],
            vec![Kind::Refund, Kind::Refund],
            vec![Kind::Capture, Kind::Refund],
        ] {
            let there = plans
                .iter()
                .any(|plan| plan.steps.iter().any(|step| kinds(step) == wanted));
            assert!(there, "nobody does {wanted:?}");
        }
        assert!(has(|step| matches!(
            step,
            Step::One(Draft {
                share: Share::Thousandths(1001..),
                ..
            })
        )));
    }
}
