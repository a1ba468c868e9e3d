//! The verdict, for people and for programs.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    io::Write as _,
};

use serde::Serialize;

use super::{
    audit::{Finding, Findings},
    customers::{Results, Shop},
    ledger::{KeyId, Ledger, Said},
    script::Fate,
};
use crate::cli::Failure;

/// How many customers are named in the table; the JSON names all.
const NAMED: usize = 10;

/// Everything that is printed. `--json` prints it as it stands here.
#[derive(Debug, Serialize)]
pub struct Report {
    seed: u64,
    mark: String,
    customers: u32,
    seconds: f64,
    requests_sent: u64,
    requests_by_fate: BTreeMap<&'static str, u64>,
    /// Requests that the service got, the audit's not counted; what came back.
    answers_by_status: BTreeMap<String, u64>,
    charges_made: usize,
    /// Customers who did more than pay; captures and refunds that were done, and
    /// those that the charge did not allow.
    customers_with_changes: usize,
    captures_made: usize,
    refunds_made: usize,
    changes_refused: usize,
    /// Keys whose first answer reached nobody: the first that came was a replay.
    first_answers_lost: usize,
    double_charges: usize,
    lost_charges: usize,
    differing_answers: usize,
    unanswered_keys: usize,
    /// Of captures and refunds, each finding by its name.
    #[serde(flatten)]
    change_findings: BTreeMap<&'static str, usize>,
    guilty: Guilty,
    /// What the tables say, if they were asked.
    #[serde(skip_serializing_if = "Option::is_none")]
    table_findings: Option<Vec<String>>,
    latency_ms: Latency,
    without_keys: WithoutKeys,
}

/// Whom it happened to: the customer, where it was the charge's key; the key or
/// the charge, where it was a change.
#[derive(Debug, Serialize)]
struct Guilty {
    double_charges: Vec<String>,
    lost_charges: Vec<String>,
    differing_answers: Vec<String>,
    unanswered_keys: Vec<String>,
    #[serde(flatten)]
    changes: BTreeMap<&'static str, Vec<String>>,
}

#[derive(Debug, Serialize)]
struct Latency {
    p50: f64,
    p90: f64,
    p99: f64,
    max: f64,
}

/// The same requests at a service that charges for each that it sees.
#[derive(Debug, Serialize)]
struct WithoutKeys {
    charges: u64,
    customers_charged_twice: u64,
    /// In the currency's minor unit.
    overcharged: i64,
}

impl Report {
    pub fn new(
        seed: u64,
        mark: &str,
        shop: &Shop,
        ledger: &Ledger,
        results: Results,
        findings: Findings,
    ) -> Self {
        let names =
            |customers: &BTreeSet<u32>| customers.iter().map(|&n| shop.customer_id(n)).collect();
        let keys = |keys: &BTreeSet<KeyId>| keys.iter().map(|&key| shop.name(key)).collect();
        let changes: BTreeMap<_, Vec<_>> = Finding::ALL
            .into_iter()
            .map(|finding| {
                let names = findings.changes.get(&finding).into_iter().flatten();
                (finding.name(), names.cloned().collect())
            })
            .collect();
        Self {
            seed,
            mark: mark.to_owned(),
            customers: shop.customers,
            seconds: results.took.as_secs_f64(),
            requests_sent: results.fates.iter().sum(),
            requests_by_fate: Fate::ALL
                .into_iter()
                .map(Fate::name)
                .zip(results.fates)
                .collect(),
            answers_by_status: answers_by_status(ledger, &results),
            charges_made: findings.charges,
            customers_with_changes: findings.changing.customers,
            captures_made: findings.changing.captures,
            refunds_made: findings.changing.refunds,
            changes_refused: findings.changing.refused,
            first_answers_lost: first_answers_lost(ledger),
            double_charges: findings.double.len(),
            lost_charges: findings.lost.len(),
            differing_answers: findings.differing.len(),
            unanswered_keys: findings.unanswered.len(),
            change_findings: changes
                .iter()
                .map(|(&name, names)| (name, names.len()))
                .collect(),
            guilty: Guilty {
                double_charges: names(&findings.double),
                lost_charges: names(&findings.lost),
                differing_answers: keys(&findings.differing),
                unanswered_keys: keys(&findings.unanswered),
                changes,
            },
            table_findings: findings.tables,
            without_keys: without_keys(shop, ledger, &results),
            latency_ms: Latency::of(results.latencies_ms),
        }
    }

    /// To standard output.
    pub fn print(&self, json: bool) -> Result<(), Failure> {
        let text = if json {
            serde_json::to_string(self)? + "\n"
        } else {
            self.table()
        };
        Ok(std::io::stdout().write_all(text.as_bytes())?)
    }

    /// The one line that decides the exit code.
    pub fn verdict(&self) -> Result<(), String> {
        let counts = self.counts();
        let wrong: Vec<_> = counts
            .iter()
            .filter(|(_, count, _)| *count > 0)
            .map(|(name, count, _)| format!("{count} {name}"))
            .collect();
        let tables = self.table_findings.as_ref().map_or(0, Vec::len);
        if wrong.is_empty() && tables == 0 {
            return Ok(());
        }
        let mut line = wrong.join(", ");
        if tables > 0 {
            let _ = write!(
                line,
                "{}{tables} findings in the tables",
                if line.is_empty() { "" } else { ", " }
            );
        }
        Err(format!("the storm found {line} (seed {})", self.seed))
    }

    fn counts(&self) -> Vec<(String, usize, &[String])> {
        let mut counts: Vec<(String, usize, &[String])> = vec![
            (
                "double charges".to_owned(),
                self.double_charges,
                &self.guilty.double_charges,
            ),
            (
                "lost charges".to_owned(),
                self.lost_charges,
                &self.guilty.lost_charges,
            ),
            (
                "differing answers".to_owned(),
                self.differing_answers,
                &self.guilty.differing_answers,
            ),
            (
                "unanswered keys".to_owned(),
                self.unanswered_keys,
                &self.guilty.unanswered_keys,
            ),
        ];
        counts.splice(2..2, Finding::ALL.map(|finding| self.of_changes(finding)));
        counts
    }

    fn of_changes(&self, finding: Finding) -> (String, usize, &[String]) {
        let names = self
            .guilty
            .changes
            .get(finding.name())
            .map_or(&[][..], Vec::as_slice);
        (finding.name().replace('_', " "), names.len(), names)
    }

    fn table(&self) -> String {
        let mut out = String::new();
        let mut row = |name: &str, value: String| {
            let _ = writeln!(out, "{name:<28}{value:>14}");
        };
        row("seed", self.seed.to_string());
        row("customers", self.customers.to_string());
        row("seconds", format!("{:.1}", self.seconds));
        row("requests sent", self.requests_sent.to_string());
        for (fate, count) in &self.requests_by_fate {
            row(&format!("  {}", fate.replace('_', " ")), count.to_string());
        }
        row(
            "answers of the service",
            self.answers_by_status.values().sum::<u64>().to_string(),
        );
        for (status, count) in &self.answers_by_status {
            row(&format!("  {status}"), count.to_string());
        }
        row("latency p50, ms", format!("{:.1}", self.latency_ms.p50));
        row("latency p90, ms", format!("{:.1}", self.latency_ms.p90));
        row("latency p99, ms", format!("{:.1}", self.latency_ms.p99));
        row("latency max, ms", format!("{:.1}", self.latency_ms.max));
        row("charges made", self.charges_made.to_string());
        row("captures made", self.captures_made.to_string());
        row("refunds made", self.refunds_made.to_string());
        row("changes refused", self.changes_refused.to_string());
        row("first answers lost", self.first_answers_lost.to_string());
        row("without keys", String::new());
        row("  charges", self.without_keys.charges.to_string());
        row(
            "  customers charged twice",
            self.without_keys.customers_charged_twice.to_string(),
        );
        row(
            "  overcharged, cents",
            self.without_keys.overcharged.to_string(),
        );
        for (name, count, _) in self.counts() {
            row(&name, count.to_string());
        }
        if let Some(findings) = &self.table_findings {
            row("findings in the tables", findings.len().to_string());
        }
        for (name, count, customers) in self.counts() {
            if count > 0 {
                let _ = writeln!(out, "{name}: {}", named(customers));
            }
        }
        for finding in self.table_findings.iter().flatten().take(NAMED) {
            let _ = writeln!(out, "in the tables: {finding}");
        }
        out
    }
}

fn named(customers: &[String]) -> String {
    let mut names = customers[..customers.len().min(NAMED)].join(", ");
    if customers.len() > NAMED {
        let _ = write!(names, " and {} more", customers.len() - NAMED);
    }
    names
}

fn answers_by_status(ledger: &Ledger, results: &Results) -> BTreeMap<String, u64> {
    let mut counts = BTreeMap::new();
    ledger.for_each(|_, operations| {
        for operation in operations.iter().filter(|o| o.called <= results.closed_at) {
            let name = match (operation.status, &operation.said) {
                // What a charge does not allow is told 400 too, and has to be.
                (Some(400), Said::Refused) => "400 undeserved".to_owned(),
                (Some(status), _) => status.to_string(),
                (None, Said::Unreached) => "not reached".to_owned(),
                (None, _) => "none".to_owned(),
            };
            *counts.entry(name).or_default() += 1;
        }
    });
    counts
}

fn first_answers_lost(ledger: &Ledger) -> usize {
    let mut lost = 0;
    ledger.for_each(|_, operations| {
        let mut answers = operations
            .iter()
            .filter(|o| matches!(o.said, Said::Answer(_)))
            .peekable();
        lost += usize::from(answers.peek().is_some() && answers.all(|answer| answer.replayed));
    });
    lost
}

/// Of the charges alone.
fn without_keys(shop: &Shop, ledger: &Ledger, results: &Results) -> WithoutKeys {
    let mut sum = WithoutKeys {
        charges: 0,
        customers_charged_twice: 0,
        overcharged: 0,
    };
    for customer in 0..shop.customers {
        let script = shop.dice.customer(customer);
        if script.declines {
            continue;
        }
        let operations = ledger.operations(KeyId::charge(customer));
        let mut amounts = operations
            .iter()
            .filter(|o| o.called <= results.closed_at && o.said != Said::Unreached)
            .map(|operation| script.amount + i64::from(operation.cart));
        sum.charges += u64::from(amounts.next().is_some());
        let more: Vec<_> = amounts.collect();
        sum.charges += more.len() as u64;
        sum.customers_charged_twice += u64::from(!more.is_empty());
        sum.overcharged += more.iter().sum::<i64>();
    }
    sum
}

impl Latency {
    fn of(mut sorted: Vec<f64>) -> Self {
        sorted.sort_unstable_by(f64::total_cmp);
        let at = |per_mille: usize| {
            let index = sorted.len() * per_mille / 1000;
            sorted
                .get(index.min(sorted.len().saturating_sub(1)))
                .copied()
                .unwrap_or_default()
        };
        Self {
            p50: at(500),
            p90: at(900),
            p99: at(990),
            max: at(1000),
        }
    }
}
