//! The verdict, for people and for programs.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
};

use serde::Serialize;

use super::NoVerdict;
use super::{
    audit::Findings,
    customers::{Results, Shop},
    ledger::{Ledger, Said},
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
    seconds: f64,
    requests_sent: u64,
    requests_by_fate: BTreeMap<&'static str, u64>,
    /// Requests that the service got, the audit's not counted; what came back.
    answers_by_status: BTreeMap<String, u64>,
    /// Null, as are the counts below, where the audit was cut off.
    charges_made: Option<usize>,
    /// Keys whose first answer reached nobody: the first that came was a replay.
    first_answers_lost: usize,
    double_charges: Option<usize>,
    lost_charges: Option<usize>,
    /// Without the audit, those that differed until then.
    differing_answers: usize,
    unanswered_keys: Option<usize>,
    guilty: Guilty,
    /// What the tables say, if they were asked.
    #[serde(skip_serializing_if = "Option::is_none")]
    table_findings: Option<Vec<String>>,
    latency_ms: Latency,
    without_keys: WithoutKeys,
}

/// Whom it happened to.
#[derive(Debug, Serialize)]
struct Guilty {
    double_charges: Vec<String>,
    lost_charges: Vec<String>,
    differing_answers: Vec<String>,
    unanswered_keys: Vec<String>,
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
        Self {
            seed,
            mark: mark.to_owned(),
            customers: results.customers,
            cut_short: results.cut_short || !findings.audited,
            seconds: results.took.as_secs_f64(),
            requests_sent: results.fates.iter().sum(),
            requests_by_fate: Fate::ALL
                .into_iter()
                .map(Fate::name)
                .zip(results.fates)
                .collect(),
            answers_by_status: answers_by_status(ledger, &results),
            charges_made: audited(findings.charges),
            first_answers_lost: first_answers_lost(ledger, &results),
            double_charges: audited(findings.double.len()),
            lost_charges: audited(findings.lost.len()),
            differing_answers: findings.differing.len(),
            unanswered_keys: audited(findings.unanswered.len()),
            guilty: Guilty {
                double_charges: names(&findings.double),
                lost_charges: names(&findings.lost),
                differing_answers: names(&findings.differing),
                unanswered_keys: names(&findings.unanswered),
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
        let (Some(charges), false) = (self.charges_made, self.cut_short) else {
            let audited = if self.charges_made.is_some() {
                "of the customers who came, all have one charge each and one answer"
            } else {
                "the charges were not audited"
            };
            let why = format!("the storm was cut short after {customers} customers; {audited}");
            return Err(NoVerdict(why.into()).into());
        };
        tell(&format!(
            "storm: nothing wrong: {customers} customers sent {} requests, {charges} charges were made, one for each of them, and every key still gives its first answer",
            self.requests_sent
        ));
        Ok(())
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

    fn counts(&self) -> [(&'static str, Option<usize>, &[String]); 4] {
        [
            (
                "double charges",
                self.double_charges,
                &self.guilty.double_charges,
            ),
            ("lost charges", self.lost_charges, &self.guilty.lost_charges),
            (
                "differing answers",
                Some(self.differing_answers),
                &self.guilty.differing_answers,
            ),
            (
                "unanswered keys",
                self.unanswered_keys,
                &self.guilty.unanswered_keys,
            ),
        ]
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
            row(name, known(count));
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
    for customer in 0..results.customers {
        for operation in ledger
            .operations(customer)
            .iter()
            .filter(|o| o.called <= results.closed_at)
        {
            let name = match operation.status {
                Some(status) => status.to_string(),
                None if operation.said == Said::Unreached => "not reached".to_owned(),
                None => "none".to_owned(),
            };
            *counts.entry(name).or_default() += 1;
        }
    }
    counts
}

fn first_answers_lost(ledger: &Ledger, results: &Results) -> usize {
    let lost = |customer: &u32| {
        let operations = ledger.operations(*customer);
        let mut answers = operations
            .iter()
            .filter(|o| matches!(o.said, Said::Answer(_)))
            .peekable();
        answers.peek().is_some() && answers.all(|answer| answer.replayed)
    };
    (0..results.customers).filter(lost).count()
}

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
        let operations = ledger.operations(customer);
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
