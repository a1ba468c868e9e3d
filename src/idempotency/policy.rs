//! Rules: for each thing that a key can stand for, how long it is kept and what
//! a duplicate gets.

use std::{fmt, str::FromStr, time::Duration};

/// What a key stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scenario {
    /// A charge that was asked for under an `Idempotency-Key`.
    Payment,
    /// A form that a person submits, perhaps twice.
    Form,
    /// An event that a source delivers at least once.
    Webhook,
    /// A message with an id of its own, from a queue that delivers at least once.
    Message,
    /// An e-mail that is to go out once.
    Email,
    /// A charge that was asked for without a key: its content is the key.
    Keyless,
    /// A message without an id: its deduplication id or its body is the key.
    MessageWithoutId,
}

/// What a duplicate gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Duplicate {
    /// The first answer again.
    Replay,
    /// It is accepted, and not done again.
    Skip,
    /// An error that says of what it is a duplicate.
    Refuse,
}

/// How long a key is kept, and what a duplicate gets within that time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rule {
    /// From the answer on, by the database's clock.
    pub keep: Duration,
    /// Until then.
    pub duplicate: Duplicate,
}

/// The rule of each scenario.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rules([Rule; Scenario::ALL.len()]);

/// A rule that differs from the default: `webhook=14d` or `form=2h,refuse`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RuleOverride {
    scenario: Scenario,
    keep: Duration,
    duplicate: Option<Duplicate>,
}

const MINUTE: u64 = 60;
const HOUR: u64 = 60 * MINUTE;
const DAY: u64 = 24 * HOUR;

/// The longest time that a setting may name: more is a slip, and would not fit
/// PostgreSQL's timestamps at some point.
const KEEP_MAX: Duration = Duration::from_hours(10 * 366 * 24);

impl Scenario {
    /// All of them, in the order in which they are shown.
    pub const ALL: [Self; 7] = [
        Self::Payment,
        Self::Form,
        Self::Webhook,
        Self::Message,
        Self::Email,
        Self::Keyless,
        Self::MessageWithoutId,
    ];

    /// Its name in settings.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Payment => "payment",
            Self::Form => "form",
            Self::Webhook => "webhook",
            Self::Message => "message",
            Self::Email => "email",
            Self::Keyless => "keyless",
            Self::MessageWithoutId => "message-without-id",
        }
    }

    /// The rule, unless it is changed.
    #[must_use]
    pub const fn default_rule(self) -> Rule {
        let (seconds, duplicate) = match self {
            Self::Payment => (DAY, Duplicate::Replay),
            Self::Form => (HOUR, Duplicate::Replay),
            Self::Webhook => (7 * DAY, Duplicate::Skip),
            Self::Message | Self::Email => (DAY, Duplicate::Skip),
            Self::Keyless => (30, Duplicate::Refuse),
            // As long as SQS's FIFO queues remember.
            Self::MessageWithoutId => (5 * MINUTE, Duplicate::Skip),
        };
        Rule {
            keep: Duration::from_secs(seconds),
            duplicate,
        }
    }

    /// What a duplicate may get. A payment's is always replayed: it is what the
    /// key was sent for. Whoever skips has no answer to give, so what has one
    /// cannot be skipped, and what has none cannot be replayed.
    #[must_use]
    pub const fn allowed(self) -> &'static [Duplicate] {
        match self {
            Self::Payment => &[Duplicate::Replay],
            Self::Keyless => &[Duplicate::Refuse, Duplicate::Replay],
            Self::Form => &[Duplicate::Replay, Duplicate::Refuse, Duplicate::Skip],
            Self::Webhook | Self::Message | Self::Email | Self::MessageWithoutId => {
                &[Duplicate::Skip, Duplicate::Refuse]
            }
        }
    }

    const fn index(self) -> usize {
        self as usize
    }
}

impl Duplicate {
    const ALL: [Self; 3] = [Self::Replay, Self::Skip, Self::Refuse];

    /// Its name in settings.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Replay => "replay",
            Self::Skip => "skip",
            Self::Refuse => "refuse",
        }
    }
}

impl Default for Rules {
    fn default() -> Self {
        Self(Scenario::ALL.map(Scenario::default_rule))
    }
}

impl Rules {
    /// The defaults, but for these.
    ///
    /// # Errors
    /// The name of a scenario that is changed twice.
    pub fn with(changes: &[RuleOverride]) -> Result<Self, String> {
        let mut rules = Self::default();
        for (i, change) in changes.iter().enumerate() {
            if changes[..i]
                .iter()
                .any(|earlier| earlier.scenario == change.scenario)
            {
                return Err(format!("{} has two rules", change.scenario.name()));
            }
            let rule = &mut rules.0[change.scenario.index()];
            rule.keep = change.keep;
            rule.duplicate = change.duplicate.unwrap_or(rule.duplicate);
        }
        Ok(rules)
    }

    /// The rule of a scenario.
    #[must_use]
    pub fn of(&self, scenario: Scenario) -> Rule {
        self.0[scenario.index()]
    }
}

impl fmt::Display for Rules {
    /// A table for a person; its first two columns are how a rule is written.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{:<20} {:<10} a duplicate gets", "scenario", "kept")?;
        for scenario in Scenario::ALL {
            let Rule { keep, duplicate } = self.of(scenario);
            let keep = humantime::format_duration(keep).to_string();
            writeln!(f, "{:<20} {keep:<10} {}", scenario.name(), duplicate.name())?;
        }
        Ok(())
    }
}

impl FromStr for RuleOverride {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, rule) = text
            .split_once('=')
            .ok_or("a rule is written like webhook=14d or form=2h,refuse")?;
        let scenario = named(&Scenario::ALL, Scenario::name, name)
            .map_err(|known| format!("there is no scenario {name}; there are {known}"))?;
        let (keep, duplicate) = match rule.split_once(',') {
            Some((keep, duplicate)) => (keep, Some(duplicate)),
            None => (rule, None),
        };
        let keep = humantime::parse_duration(keep)
            .map_err(|error| format!("{error}; write the time like 24h, 90s or 250ms"))?;
        if keep.is_zero() || keep > KEEP_MAX {
            return Err("the time has to be more than 0 and at most 10 years".to_owned());
        }
        let duplicate = duplicate
            .map(|duplicate| {
                let allowed = scenario.allowed();
                let name = scenario.name();
                named(&Duplicate::ALL, Duplicate::name, duplicate)
                    .ok()
                    .filter(|duplicate| allowed.contains(duplicate))
                    .ok_or_else(|| {
                        let allowed: Vec<_> = allowed.iter().map(|d| d.name()).collect();
                        format!("a duplicate of {name} can get: {}", allowed.join(", "))
                    })
            })
            .transpose()?;
        Ok(Self {
            scenario,
            keep,
            duplicate,
        })
    }
}

/// The one of this name, or the names that there are.
fn named<T: Copy>(all: &[T], name_of: fn(T) -> &'static str, name: &str) -> Result<T, String> {
    all.iter()
        .copied()
        .find(|item| name_of(*item) == name)
        .ok_or_else(|| {
            all.iter()
                .map(|item| name_of(*item))
                .collect::<Vec<_>>()
                .join(", ")
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_are_the_handbooks() {
        let rules = Rules::default();
        let rule = |scenario| {
            let Rule { keep, duplicate } = rules.of(scenario);
            (keep.as_secs(), duplicate)
        };
        assert_eq!(rule(Scenario::Payment), (86_400, Duplicate::Replay));
        assert_eq!(rule(Scenario::Form), (3_600, Duplicate::Replay));
        assert_eq!(rule(Scenario::Webhook), (604_800, Duplicate::Skip));
        assert_eq!(rule(Scenario::Message), (86_400, Duplicate::Skip));
        assert_eq!(rule(Scenario::Email), (86_400, Duplicate::Skip));
        assert_eq!(rule(Scenario::Keyless), (30, Duplicate::Refuse));
        assert_eq!(rule(Scenario::MessageWithoutId), (300, Duplicate::Skip));
    }

    #[test]
    fn every_scenario_has_its_own_place_and_allows_its_default() {
        for (i, scenario) in Scenario::ALL.into_iter().enumerate() {
            assert_eq!(scenario.index(), i);
            assert!(
                scenario
                    .allowed()
                    .contains(&scenario.default_rule().duplicate)
            );
        }
    }

    #[test]
    fn a_change_changes_its_rule_alone() {
        let changes = ["webhook=14d", "form=2h,refuse"].map(|text| text.parse().unwrap());
        let rules = Rules::with(&changes).unwrap();
        for scenario in Scenario::ALL {
            let Rule { keep, duplicate } = rules.of(scenario);
            let expected = match scenario {
                Scenario::Webhook => (14 * DAY, Duplicate::Skip),
                Scenario::Form => (2 * HOUR, Duplicate::Refuse),
                other => {
                    let rule = other.default_rule();
                    (rule.keep.as_secs(), rule.duplicate)
                }
            };
            assert_eq!((keep.as_secs(), duplicate), expected);
        }
    }

    #[test]
    fn what_is_no_rule_is_refused_by_its_reason() {
        for (text, why) in [
            ("webhook", "written like"),
            ("", "written like"),
            ("refund=1d", "there is no scenario refund"),
            ("form=soon", "write the time like"),
            ("form=0s", "more than 0"),
            ("form=99y", "at most 10 years"),
            ("form=1h,never", "can get: replay, refuse, skip"),
            ("payment=1h,skip", "can get: replay"),
            ("keyless=1m,skip", "can get: refuse, replay"),
            ("webhook=1h,replay", "can get: skip, refuse"),
        ] {
            let said = text.parse::<RuleOverride>().unwrap_err();
            assert!(said.contains(why), "{text}: {said}");
        }
        let twice = ["form=1h", "form=2h"].map(|text| text.parse().unwrap());
        assert!(
            Rules::with(&twice)
                .unwrap_err()
                .contains("form has two rules")
        );
    }
}
