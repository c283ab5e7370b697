//! The DAG of resolved stages: several pipelines as one graph in which equal stages are one node.

use std::{
    collections::{BTreeMap, HashMap},
    path::PathBuf,
};

use petgraph::graph::{DiGraph, NodeIndex};

use crate::pipeline::{InputSource, Pipeline, Stage};

/// A node of the merged graph: every place, (pipeline, stage), at which this stage stands.
#[derive(Debug)]
pub struct MergedNode {
    pub occurrences: Vec<(usize, usize)>,
}

/// Nodes in an order in which every one comes after what it needs.
#[derive(Debug)]
pub struct Merged {
    pub nodes: Vec<MergedNode>,
}

/// A producer of an input, once equal stages are one.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Producer {
    File(PathBuf),
    Node(usize, usize),
}

/// Everything that makes two stages the same work. Names are not part of it.
#[derive(Debug, PartialEq, Eq, Hash)]
struct Identity {
    kind: &'static str,
    params: String,
    inputs: BTreeMap<String, Producer>,
    outputs: Vec<(String, String)>,
    env: Vec<String>,
    passed: Vec<Vec<String>>,
    code: Vec<PathBuf>,
    gpus: bool,
}

/// Merges pipelines whose stages have no cycle (loading has refused those).
pub fn merge(pipelines: &[Pipeline]) -> Merged {
    let mut nodes: Vec<MergedNode> = Vec::new();
    let mut known: HashMap<Identity, usize> = HashMap::new();
    for (p, pipeline) in pipelines.iter().enumerate() {
        let mut node_of = vec![usize::MAX; pipeline.stages.len()];
        for s in order(pipeline) {
            let identity = identity(&pipeline.stages[s], &node_of);
            // Within one pipeline two equal stages stay two, so that each is shown under its own name.
            let found = known.get(&identity).copied().filter(|&n| !nodes[n].occurrences.iter().any(|&(q, _)| q == p));
            let node = found.unwrap_or_else(|| {
                nodes.push(MergedNode { occurrences: Vec::new() });
                nodes.len() - 1
            });
            known.entry(identity).or_insert(node);
            nodes[node].occurrences.push((p, s));
            node_of[s] = node;
        }
    }
    Merged { nodes }
}

/// The stages of a pipeline, each after what it needs; otherwise as in the file.
pub fn order(pipeline: &Pipeline) -> Vec<usize> {
    let mut graph: DiGraph<usize, ()> = DiGraph::with_capacity(pipeline.stages.len(), pipeline.stages.len());
    for s in 0..pipeline.stages.len() {
        graph.add_node(s);
    }
    for (s, stage) in pipeline.stages.iter().enumerate() {
        for source in stage.inputs.values() {
            if let InputSource::Stage { stage: producer, .. } = source {
                graph.add_edge(NodeIndex::new(*producer), NodeIndex::new(s), ());
            }
        }
    }
    petgraph::algo::toposort(&graph, None)
        .map(|order| order.into_iter().map(NodeIndex::index).collect())
        .unwrap_or_else(|_| (0..pipeline.stages.len()).collect())
}

fn identity(stage: &Stage, node_of: &[usize]) -> Identity {
    let producer = |source: &InputSource| match source {
        InputSource::File(path) => Producer::File(path.clone()),
        InputSource::Stage { stage, output } => Producer::Node(node_of[*stage], *output),
    };
    Identity {
        kind: stage.kind.name(),
        params: stage.params.to_string(),
        inputs: stage.inputs.iter().map(|(port, source)| (port.clone(), producer(source))).collect(),
        outputs: stage.outputs.iter().map(|o| (o.name.to_string(), o.file.to_string())).collect(),
        env: stage.env.clone(),
        passed: vec![stage.pass_env.clone(), stage.secrets.clone()],
        code: stage.code.clone(),
        gpus: stage.resources.gpus > 0,
    }
}
