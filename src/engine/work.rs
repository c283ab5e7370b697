//! The work that a request names: the stages of one or several pipelines as one graph in which equal stages are one
//! node, and which of them may run.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
};

use crate::{
    graph,
    pipeline::{InputSource, Pipeline, Stage},
};

/// A node of the graph: an index into [`Work::nodes`].
pub type NodeId = usize;

/// Which parts of the graph a request means.
#[derive(Debug, Clone, Default)]
pub struct Parts {
    /// These stages and all that they need.
    pub until: Vec<String>,
    /// These stages and all that depends on them; what they need must be there.
    pub from: Vec<String>,
    /// These stages and no others; what they need must be there.
    pub only: Vec<String>,
    /// These run even if their results are there.
    pub force: Vec<String>,
}

impl Parts {
    /// Whether the whole graph is meant, nothing forced.
    pub fn is_everything(&self) -> bool {
        self.until.is_empty() && self.from.is_empty() && self.only.is_empty() && self.force.is_empty()
    }
}

/// What may happen to a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Permission {
    /// Runs if its result is missing.
    Run,
    /// Runs even if its result is there.
    Force,
    /// Its result is needed, but it must not run.
    UseOnly,
    /// Nobody asked for it.
    Leave,
}

/// Where one input comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    File(PathBuf),
    /// An output of another node: its port, and the file name under which it is shown.
    Output {
        node: NodeId,
        port: String,
        file: String,
    },
}

/// A stage of a pipeline: indices into [`Work::pipelines`] and its stages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    pub pipeline: usize,
    pub stage: usize,
}

/// One stage to decide and perhaps to run; equal stages of several variants share one.
#[derive(Debug, Clone)]
pub struct Node {
    /// The stage's name; where a sweep has several stages of that name, with the variant behind it.
    pub label: String,
    /// Every place that shows its result; the first gives its definition.
    pub places: Vec<Place>,
    pub sources: BTreeMap<String, Source>,
    pub dependents: Vec<NodeId>,
    pub permission: Permission,
}

/// The graph of a request. Nodes stand in an order in which every one comes after what it needs.
#[derive(Debug)]
pub struct Work {
    pub pipelines: Vec<Pipeline>,
    pub nodes: Vec<Node>,
}

/// A stage was named that no pipeline of the request has.
#[derive(Debug, thiserror::Error)]
#[error("there is no stage `{name}`")]
pub struct UnknownStage {
    pub name: String,
    pub nearest: Option<String>,
}

impl Work {
    /// Merges the pipelines and marks what `parts` means.
    ///
    /// # Errors
    /// `parts` names a stage that does not exist.
    pub fn new(pipelines: Vec<Pipeline>, parts: &Parts) -> Result<Self, UnknownStage> {
        let merged = graph::merge(&pipelines);
        let mut nodes: Vec<Node> = Vec::with_capacity(merged.nodes.len());
        let mut node_of: Vec<Vec<NodeId>> = pipelines.iter().map(|p| vec![usize::MAX; p.stages.len()]).collect();
        for (id, merged_node) in merged.nodes.iter().enumerate() {
            let places: Vec<Place> =
                merged_node.occurrences.iter().map(|&(pipeline, stage)| Place { pipeline, stage }).collect();
            for place in &places {
                node_of[place.pipeline][place.stage] = id;
            }
            let Place { pipeline, stage } = places[0];
            let definition = &pipelines[pipeline].stages[stage];
            let sources = definition
                .inputs
                .iter()
                .map(|(port, source)| {
                    let source = match source {
                        InputSource::File(path) => Source::File(path.clone()),
                        InputSource::Stage { stage: producer, output } => {
                            let node = node_of[pipeline][*producer];
                            let output = &pipelines[pipeline].stages[*producer].outputs[*output];
                            Source::Output { node, port: output.name.to_string(), file: output.file.to_string() }
                        }
                    };
                    (port.clone(), source)
                })
                .collect();
            nodes.push(Node {
                label: definition.name.to_string(),
                places,
                sources,
                dependents: Vec::new(),
                permission: Permission::Run,
            });
        }
        for id in 0..nodes.len() {
            for producer in producers(&nodes[id]).collect::<BTreeSet<_>>() {
                nodes[producer].dependents.push(id);
            }
        }
        let mut work = Self { pipelines, nodes };
        work.label_apart();
        work.permit(parts)?;
        Ok(work)
    }

    /// The definition that a node stands for.
    pub fn stage(&self, node: NodeId) -> &Stage {
        let Place { pipeline, stage } = self.nodes[node].places[0];
        &self.pipelines[pipeline].stages[stage]
    }

    /// How a pipeline of the request is called in `out/`: `name` or `name@variant`.
    pub fn title(&self, pipeline: usize) -> String {
        title(&self.pipelines[pipeline])
    }

    /// The nodes of this stage name, in any of the pipelines.
    fn named(&self, name: &str) -> Result<Vec<NodeId>, UnknownStage> {
        let found: Vec<NodeId> = (0..self.nodes.len()).filter(|&id| self.stage(id).name.to_string() == name).collect();
        if !found.is_empty() {
            return Ok(found);
        }
        let nearest = (0..self.nodes.len())
            .map(|id| self.stage(id).name.to_string())
            .max_by(|a, b| strsim::jaro_winkler(a, name).total_cmp(&strsim::jaro_winkler(b, name)))
            .filter(|n| strsim::jaro_winkler(n, name) > 0.7);
        Err(UnknownStage { name: name.to_owned(), nearest })
    }

    /// Several nodes of one name are told apart by the first variant that has each.
    fn label_apart(&mut self) {
        let mut count: BTreeMap<String, usize> = BTreeMap::new();
        for node in &self.nodes {
            *count.entry(node.label.clone()).or_default() += 1;
        }
        for id in 0..self.nodes.len() {
            if count[&self.nodes[id].label] > 1
                && let Some(variant) = &self.pipelines[self.nodes[id].places[0].pipeline].variant
            {
                self.nodes[id].label = format!("{}@{variant}", self.nodes[id].label);
            }
        }
    }

    fn permit(&mut self, parts: &Parts) -> Result<(), UnknownStage> {
        let all = |names: &[String]| -> Result<Vec<NodeId>, UnknownStage> {
            names.iter().map(|n| self.named(n)).collect::<Result<Vec<_>, _>>().map(|v| v.concat())
        };
        let (until, from, only, force) = (all(&parts.until)?, all(&parts.from)?, all(&parts.only)?, all(&parts.force)?);
        let restricted = !(until.is_empty() && from.is_empty() && only.is_empty());
        if restricted {
            let mut run: BTreeSet<NodeId> = only.into_iter().collect();
            run.extend(self.reach(until, |node| producers(node).collect()));
            run.extend(self.reach(from, |node| node.dependents.clone()));
            let needed = self.reach(run.iter().copied().collect(), |node| producers(node).collect());
            for (id, node) in self.nodes.iter_mut().enumerate() {
                node.permission = if run.contains(&id) {
                    Permission::Run
                } else if needed.contains(&id) {
                    Permission::UseOnly
                } else {
                    Permission::Leave
                };
            }
        }
        for id in force {
            self.nodes[id].permission = Permission::Force;
        }
        Ok(())
    }

    /// All nodes that `next` leads to, the first ones included.
    fn reach(&self, first: Vec<NodeId>, next: impl Fn(&Node) -> Vec<NodeId>) -> BTreeSet<NodeId> {
        let mut reached: BTreeSet<NodeId> = first.iter().copied().collect();
        let mut open = first;
        while let Some(id) = open.pop() {
            open.extend(next(&self.nodes[id]).into_iter().filter(|&n| reached.insert(n)));
        }
        reached
    }
}

/// The nodes that a node reads from, with repetitions.
pub fn producers(node: &Node) -> impl Iterator<Item = NodeId> + '_ {
    node.sources.values().filter_map(|source| match source {
        Source::Output { node, .. } => Some(*node),
        Source::File(_) => None,
    })
}

/// How a pipeline is called in `out/`: `name` or `name@variant`.
pub fn title(pipeline: &Pipeline) -> String {
    match &pipeline.variant {
        Some(variant) => format!("{}@{variant}", pipeline.name),
        None => pipeline.name.clone(),
    }
}
