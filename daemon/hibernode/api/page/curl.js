// The same request as a line for a shell. The token is a variable there: a line that is passed on gives nothing away.

const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

export function curl(path, body) {
  const url = quoted(location.origin + path);
  const headers = `-H "Authorization: Bearer $HIBERNODE_TOKEN" -H 'Content-Type: application/json'`;
  return `curl -sS -X POST ${url} ${headers} -d ${quoted(JSON.stringify(body))}`;
}

/** What was sent to begin this action. */
export function request(action) {
  const overrides = action.overrides ?? {};
  if (action.type === "restore") {
    return ["/v2/restore/pod", { action_id: action.source_action_id, reason: action.reason, overrides }];
  }
  const { pod_id = null, namespace, pod_name, kind, reason } = action;
  return ["/v2/checkpoint/pod", { pod_id, namespace, pod_name, kind, reason, overrides }];
}
