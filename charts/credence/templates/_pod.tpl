{{/* Parts that the pods of broker and webhook share. Each takes (dict "root" $ "component" "broker"). */}}

{{/* The labels have no version, so a new chart with the same programs restarts no pod. There is no checksum of the
ConfigMaps, because the programs follow all of them while they run. */}}
{{- define "credence.podMetadata" -}}
{{- $values := index .root.Values .component -}}
labels:
  {{- include "credence.selector" . | nindent 2 }}
  app.kubernetes.io/part-of: credence
  {{- with merge (dict) (default dict $values.podLabels) (default dict .root.Values.commonLabels) }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- $annotations := deepCopy (default dict $values.podAnnotations) -}}
{{- if .root.Values.metrics.annotatePods }}
{{- $annotations = merge $annotations (dict "prometheus.io/scrape" "true" "prometheus.io/port" (include "credence.adminPort" .) "prometheus.io/path" "/metrics") }}
{{- end }}
{{- with $annotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* The port for metrics, and for the health of brokers. */}}
{{- define "credence.adminPort" -}}
{{ if eq .component "webhook" }}{{ int .root.Values.webhook.adminPort }}{{ else }}8080{{ end }}
{{- end }}

{{/* The security context of pods. Takes (dict "root" $ "user" 65532 "more" dict). */}}
{{- define "credence.podSecurity" -}}
securityContext:
  runAsNonRoot: true
  {{- if ne (int .user) -1 }}
  runAsUser: {{ int64 .user }}
  runAsGroup: {{ int64 .user }}
  {{- end }}
  {{- toYaml (merge (deepCopy (default dict .more)) (dict "seccompProfile" (dict "type" "RuntimeDefault"))) | nindent 2 }}
{{- end }}

{{/* The security context of every container. */}}
{{- define "credence.containerSecurity" -}}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities:
    drop: [ALL]
{{- end }}

{{/* Fields of the pod's spec, except its containers and volumes. */}}
{{- define "credence.podSpec" -}}
{{- $values := index .root.Values .component -}}
serviceAccountName: {{ include "credence.serviceAccountName" . | quote }}
automountServiceAccountToken: true
enableServiceLinks: false
{{- with .root.Values.priorityClassName }}
priorityClassName: {{ . | quote }}
{{- end }}
{{- with include "credence.pullSecrets" .root }}
{{ . }}
{{- end }}
{{ include "credence.podSecurity" (dict "root" .root "user" .root.Values.runAsUser "more" $values.podSecurityContext) }}
{{- with $values.dnsConfig }}
dnsConfig:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- /* Each revision of the Deployment spreads on its own. Otherwise an upgrade would leave an uneven spread. The nodes are not
a second constraint of the spread: the scheduler ignores nodes that lack the label of any constraint, and not all
clusters have zones. */}}
affinity:
  {{- if $values.affinity }}
  {{- toYaml $values.affinity | nindent 2 }}
  {{- else }}
  podAntiAffinity:
    preferredDuringSchedulingIgnoredDuringExecution:
    - weight: 100
      podAffinityTerm:
        topologyKey: kubernetes.io/hostname
        labelSelector:
          matchLabels:
            {{- include "credence.selector" . | nindent 12 }}
        matchLabelKeys: [pod-template-hash]
  {{- end }}
topologySpreadConstraints:
  {{- if $values.topologySpreadConstraints }}
  {{- toYaml $values.topologySpreadConstraints | nindent 2 }}
  {{- else }}
  - maxSkew: 1
    topologyKey: topology.kubernetes.io/zone
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
        {{- include "credence.selector" . | nindent 8 }}
    matchLabelKeys: [pod-template-hash]
  {{- end }}
{{- end }}

{{/* Fields of the container, except its name and arguments. */}}
{{- define "credence.container" -}}
{{- $values := index .root.Values .component -}}
image: {{ include "credence.image" (dict "root" .root "image" (index .root.Values.images .component)) | quote }}
imagePullPolicy: {{ .root.Values.images.pullPolicy }}
command: [/credence-{{ .component }}]
terminationMessagePolicy: FallbackToLogsOnError
{{ include "credence.containerSecurity" . }}
{{- with $values.resources }}
resources:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* The arguments of a program: args, a YAML list of the chart's own, and the value extraArgs. The last of two equal flags
would win, so the value must not have a flag that the chart sets, nor one that it sets with other values: both programs may
need to know. The chart's ports, probes and mounts fit the defaults of the other flags that it refuses. */}}
{{- define "credence.args" -}}
{{- $set := list "--listen" "--admin-listen" "--tls-cert" "--tls-key" "--kubeconfig" "--base-arn" "--rules-file" -}}
{{- if eq .component "broker" }}
{{- $set = concat $set (list "--assume-role" "--command-account" "--issuer" "--pod-ips" "--region" "--sts-endpoint" "--trace-endpoint" "--trace-ratio") }}
{{- else }}
{{- $set = concat $set (list "--cluster-domain" "--role-chaining" "--sidecar-image-pull-policy") }}
{{- end -}}
{{- range fromYamlArray .args }}{{ $set = append $set (first (splitList "=" .)) }}{{ end -}}
{{ trim .args }}
{{- range (index .root.Values .component).extraArgs }}
{{- $flag := first (splitList "=" .) }}
{{- if has $flag $set }}
{{- fail (printf "%s.extraArgs: %s belongs to the chart or is there twice; remove it, and use the value that sets it" $.component $flag) }}
{{- end }}
{{- if and (eq $flag "--debug-listen") (not (regexMatch "=(127[.]0[.]0[.]1:[0-9]+|\\[::1\\]:[0-9]+)?$" .)) }}
{{- fail (printf "%s.extraArgs: %s lets all pods read session data; use an address of the loopback, or none" $.component .) }}
{{- end }}
{{- $set = append $set $flag }}
- {{ . | quote }}
{{- end }}
{{- end }}

{{/* The value env. Helm 4 uses server-side apply, with which an API server refuses a name that env has twice. Takes also
"named", the names that the chart sets. */}}
{{- define "credence.env" -}}
{{- $named := .named -}}
{{- range (index .root.Values .component).env }}
{{- if has .name $named }}
{{- fail (printf "%s.env: %s is set already, by the chart, by the value proxy, or earlier in the list; remove it" $.component .name) }}
{{- end }}
{{- $named = append $named .name }}
{{- end }}
{{- with (index .root.Values .component).env }}
{{- toYaml . }}
{{- end }}
{{- end }}

{{/* A new pod is ready before an old one terminates, so the number of ready pods never falls below replicas. On the host's
network, a new pod may need the port of an old one. */}}
{{- define "credence.strategy" -}}
type: RollingUpdate
rollingUpdate:
  maxUnavailable: {{ if (index .root.Values .component).hostNetwork }}1{{ else }}0{{ end }}
  maxSurge: 1
{{- end }}

{{- define "credence.disruptionBudget" -}}
{{- with (index .root.Values .component).podDisruptionBudget -}}
{{- if .enabled }}
---
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata:
  name: credence-{{ $.component }}
  namespace: {{ include "credence.namespace" $.root | quote }}
  labels:
    {{- include "credence.labels" $ | nindent 4 }}
spec:
  {{- if not (has (toString .minAvailable) (list "" "<nil>")) }}
  minAvailable: {{ kindIs "string" .minAvailable | ternary .minAvailable (int .minAvailable) }}
  {{- else }}
  # Not minAvailable: with one replica, it would block each drain of the node forever.
  maxUnavailable: {{ kindIs "string" .maxUnavailable | ternary .maxUnavailable (int .maxUnavailable) }}
  {{- end }}
  # Pods that are not ready serve nothing, so they may be evicted.
  unhealthyPodEvictionPolicy: AlwaysAllow
  selector:
    matchLabels:
      {{- include "credence.selector" $ | nindent 6 }}
{{- end }}
{{- end }}
{{- end }}

{{- define "credence.serviceAccount" -}}
{{- $values := index .root.Values .component -}}
{{- if $values.serviceAccount.create }}
apiVersion: v1
kind: ServiceAccount
metadata:
  name: {{ include "credence.serviceAccountName" . | quote }}
  namespace: {{ include "credence.namespace" .root | quote }}
  labels:
    {{- include "credence.labels" . | nindent 4 }}
  {{- with $values.serviceAccount.annotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
# Pods that need the token mount it explicitly.
automountServiceAccountToken: false
---
{{- end }}
{{- end }}

{{/* The Prometheus Operator finds the pods of a component by one of these objects. */}}
{{- define "credence.monitor" -}}
{{- $metrics := .root.Values.metrics -}}
{{- if and $metrics.serviceMonitor.enabled $metrics.podMonitor.enabled }}
{{- fail "metrics: serviceMonitor and podMonitor are both enabled, so Prometheus would scrape each pod twice; disable one of them" }}
{{- end }}
{{- range $kind := list "ServiceMonitor" "PodMonitor" }}
{{- with index $metrics (untitle $kind) }}
{{- if .enabled }}
---
apiVersion: monitoring.coreos.com/v1
kind: {{ $kind }}
metadata:
  name: credence-{{ $.component }}
  namespace: {{ include "credence.namespace" $.root | quote }}
  labels:
    {{- merge (dict) (default dict .labels) (include "credence.labels" $ | fromYaml) | toYaml | nindent 4 }}
spec:
  selector:
    matchLabels:
      {{- include "credence.selector" $ | nindent 6 }}
  {{- if eq $kind "ServiceMonitor" }}
  endpoints:
    - port: http-metrics
  {{- else }}
  podMetricsEndpoints:
    - port: admin
  {{- end }}
      interval: {{ .interval | quote }}
      {{- with .scrapeTimeout }}
      scrapeTimeout: {{ . | quote }}
      {{- end }}
      {{- with .relabelings }}
      relabelings:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      {{- with .metricRelabelings }}
      metricRelabelings:
        {{- toYaml . | nindent 8 }}
      {{- end }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}
