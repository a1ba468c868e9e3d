//! The verdict, for people and for programs.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
};

use serde::Serialize;

use super::{
    NoVerdict,
    audit::{Finding, Findings},
    customers::{Results, Shop},
    ledger::{KeyId, Ledger, Said},
    script::Fate,
};
use crate::cli::{self, Failure, tell};

/// How many customers are named in the table; the JSON names all.
const NAMED: usize = 10;

/// Everything that is printed. `--json` prints it as it stands here.
#[derive(Debug, Serialize)]
pub struct Report {
    seed: u64,
    mark: String,
    /// How many came.
    customers: u32,
    /// By Ctrl-C: there were to be more customers, or an audit.
    cut_short: bool,
    /// So that not every key gives its first answer.
    #[serde(skip)]
    answers_expire: bool,
    seconds: f64,
    requests_sent: u64,
    requests_by_fate: BTreeMap<&'static str, u64>,
    /// Requests that the service got, the audit's not counted; what came back.
    answers_by_status: BTreeMap<String, u64>,
    /// Null, as are the counts below, where the audit was cut off.
    charges_made: Option<usize>,
    /// Customers who did more than pay; captures and refunds that were done, and
    /// those that the charge did not allow.
    customers_with_changes: Option<usize>,
    captures_made: Option<usize>,
    refunds_made: Option<usize>,
    changes_refused: Option<usize>,
    /// Keys whose first answer reached nobody: the first that came was a replay.
    first_answers_lost: usize,
    double_charges: Option<usize>,
    lost_charges: Option<usize>,
    /// Without the audit, those that differed until then.
    differing_answers: usize,
    unanswered_keys: Option<usize>,
    /// Of captures and refunds, each finding by its name.
    #[serde(flatten)]
    change_findings: BTreeMap<&'static str, Option<usize>>,
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
        let audited = |count: usize| findings.audited.then_some(count);
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
            customers: results.customers,
            cut_short: results.cut_short || !findings.audited,
            answers_expire: shop.answers_expire,
            seconds: results.took.as_secs_f64(),
            requests_sent: results.fates.iter().sum(),
            requests_by_fate: Fate::ALL
                .into_iter()
                .map(Fate::name)
                .zip(results.fates)
                .collect(),
            answers_by_status: answers_by_status(ledger, &results),
            charges_made: audited(findings.charges),
            customers_with_changes: audited(findings.changing.customers),
            captures_made: audited(findings.changing.captures),
            refunds_made: audited(findings.changing.refunds),
            changes_refused: audited(findings.changing.refused),
            first_answers_lost: first_answers_lost(ledger),
            double_charges: audited(findings.double.len()),
            lost_charges: audited(findings.lost.len()),
            differing_answers: findings.differing.len(),
            unanswered_keys: audited(findings.unanswered.len()),
            change_findings: changes
                .iter()
                .map(|(&name, names)| (name, audited(names.len())))
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
        cli::print(&text)
    }

    /// What it comes to, in a sentence on standard error; decides the exit code.
    pub fn verdict(&self) -> Result<(), Failure> {
        let seed = self.seed;
        let wrong = self.wrong();
        if !wrong.is_empty() {
            return Err(format!("the storm found {wrong} (seed {seed})").into());
        }
        let customers = self.customers;
        let made = self.made();
        let (Some(made), false) = (&made, self.cut_short) else {
            let audited = made.map_or_else(
                || "the charges were not audited".to_owned(),
                |made| format!("nothing was wrong until then: {made}"),
            );
            let why = format!("the storm was cut short after {customers} customers; {audited}");
            return Err(NoVerdict(why.into()).into());
        };
        tell(&format!(
            "storm: nothing wrong: {customers} customers sent {} requests; {made}",
            self.requests_sent
        ));
        Ok(())
    }

    /// What a run came to in which nothing is wrong, if it was audited.
    fn made(&self) -> Option<String> {
        let (charges, captures, refunds) =
            (self.charges_made?, self.captures_made?, self.refunds_made?);
        let answer = if self.answers_expire {
            "an answer"
        } else {
            "its first answer"
        };
        Some(format!(
            "{charges} charges were made, one for each of them, {captures} captures and {refunds} refunds, and every key still gives {answer}"
        ))
    }

    fn wrong(&self) -> String {
        let counts = self.counts();
        let mut wrong: Vec<_> = counts
            .iter()
            .filter_map(|(name, count, _)| Some((name, count.filter(|&count| count > 0)?)))
            .map(|(name, count)| format!("{count} {name}"))
            .collect();
        let tables = self.table_findings.as_ref().map_or(0, Vec::len);
        if tables > 0 {
            wrong.push(format!("{tables} findings in the tables"));
        }
        wrong.join(", ")
    }

    fn counts(&self) -> Vec<(String, Option<usize>, &[String])> {
        let mut counts: Vec<(String, Option<usize>, &[String])> = vec![
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
                Some(self.differing_answers),
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

    fn of_changes(&self, finding: Finding) -> (String, Option<usize>, &[String]) {
        let count = self.change_findings.get(finding.name()).copied().flatten();
        let names = self
            .guilty
            .changes
            .get(finding.name())
            .map_or(&[][..], Vec::as_slice);
        (finding.name().replace('_', " "), count, names)
    }

    fn table(&self) -> String {
        let mut out = String::new();
        let mut row = |name: &str, value: String| {
            let _ = writeln!(out, "{name:<28}{value:>14}");
        };
        row("seed", self.seed.to_string());
        row("customers", self.customers.to_string());
        if self.cut_short {
            row("cut short by Ctrl-C", "yes".to_owned());
        }
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
        row("charges made", known(self.charges_made));
        row("captures made", known(self.captures_made));
        row("refunds made", known(self.refunds_made));
        row("changes refused", known(self.changes_refused));
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
            row(&name, known(count));
        }
        if let Some(findings) = &self.table_findings {
            row("findings in the tables", findings.len().to_string());
        }
        for (name, count, customers) in self.counts() {
            if count.is_some_and(|count| count > 0) {
                let _ = writeln!(out, "{name}: {}", named(customers));
            }
        }
        for finding in self.table_findings.iter().flatten().take(NAMED) {
            let _ = writeln!(out, "in the tables: {finding}");
        }
        out
    }
}

fn known(count: Option<usize>) -> String {
    count.map_or_else(|| "not audited".to_owned(), |count| count.to_string())
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
    for customer in 0..results.customers {
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
